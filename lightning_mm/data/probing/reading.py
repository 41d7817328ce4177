"""Any file that tells something about pictures, into Scenes; what cannot be so becomes a ledger entry with its line.

Data flow: file -> rows (``sources``, ``coco``) -> checked Samples (``rows``) -> ``scenes`` -> ``drawing``.

One row per picture, in a JSON list or one per line (JSONL):

    {"id": "7", "image": "a.jpg",
     "caption": "a cat on a chair",
     "false_captions": ["a dog on a chair"],
     "objects": [{"name": "cat", "category": "animal", "box": [10, 20, 80, 90]}, {"name": "chair"}],
     "group": "12"}

    image           relative to the image root, which it may not leave; the only key that must be there
    caption         true of the picture; a text, or a list of several of which one is used
    false_captions  nearly true: what a hard wrong caption is; made from other pictures' captions where it is missing
    objects         everything there is: what is not listed counts as absent; ``box`` is [x0, y0, x1, y1] in pixels of
                    the picture as stored, or missing if not known; ``category`` (and ``group``) are coarser names
    group           of rows that depend on one another (frames of one video, pictures that trade captions): no split
                    tears them apart, and they trade captions among themselves, or all with those of one other group

The nano data's rows (``boxes``, ``caption_swapped``) and LLaVA's may hold the same keys beside a conversation; where
one has no ``caption``, its answer may be one by the rule of ``descriptions``. COCO's annotation files are read by
``coco``.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_mm.data import sources
from lightning_mm.data.probing.choosing import not_whole
from lightning_mm.data.probing.coco import coco_rows, is_coco
from lightning_mm.data.probing.descriptions import RULE
from lightning_mm.data.probing.scenes import Scene, Unused, scene
from lightning_mm.data.rows import BadRow, RowReader
from lightning_mm.data.sample import Rejection
from lightning_mm.decisions import decide
from lightning_mm.errors import UserError

_ASKED = {"conversations": [{"from": "human", "value": "What is in the picture?"}]}
"""For rows that only tell about a picture: the reader of conversations then checks their picture's path."""


@dataclass(frozen=True)
class Scenes:
    """A file, read.

    Args:
        scenes: One per picture, in file order.
        rejections: Rows that are wrong.
        num_rows: All rows, also those that tell nothing that can be asked.
    """

    scenes: tuple[Scene, ...]
    rejections: tuple[Rejection, ...]
    num_rows: int


def read_scenes(path: Path | str, image_root: Path | str | None = None) -> Scenes:
    """Read a file of pictures with captions or objects.

    Args:
        path: Rows in one of the forms above, or a COCO annotation file.
        image_root: The folder that image paths are relative to; the file's own folder if None.

    Raises:
        UserError: No such file, or not one that can be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"No file {path} to draw probes from.", "It does not exist.", "Give --data.probes FILE, or leave it out."
        )
    reader = RowReader(Path(image_root) if image_root else path.parent, answers_required=False)
    scenes: dict[Path, Scene] = {}
    rejections: list[Rejection] = []
    unused: Counter[str] = Counter()
    num_rows, torn = 0, set[str]()
    for origin, row in _rows(path):
        num_rows += 1
        try:
            found = _scene(reader, row, origin)
        except BadRow as error:
            rejections.append(Rejection(origin, str(error)))
            torn.add(str(row.get("group", "")) if isinstance(row, dict) else "")
        except Unused as why:
            unused[str(why)] += 1
        else:
            known = scenes.get(found.image)
            unused["further rows about the same picture"] += known is not None
            if known is None or found.richness > known.richness:
                scenes[found.image] = found
    torn &= {each.group for each in scenes.values() if each.group and each.false_captions}
    rejections += [not_whole(each) for each in scenes.values() if each.group in torn]
    whole = [each for each in scenes.values() if each.group not in torn]
    _say(path, len(whole), num_rows, unused)
    return Scenes(_with_unique_ids(whole), tuple(rejections), num_rows)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        head = file.read(65536).decode("utf-8-sig", errors="replace")
    return coco_rows(path) if is_coco(head) else sources.raw_rows(path)


def _scene(reader: RowReader, row: Any, origin: str) -> Scene:
    if isinstance(row, dict) and "conversations" not in row and "messages" not in row:
        if row.get("image") is None:
            raise BadRow("no picture: the row has no 'image'")
        return scene(reader.sample({**row, **_ASKED}, origin))
    sample = reader.sample(row, origin)
    try:
        return scene(sample)
    except BadRow as error:  # a conversation may hold such keys with a meaning of its own
        raise Unused(f"conversations whose keys say something else ({str(error).partition(':')[0]})") from error


def _with_unique_ids(scenes: Iterable[Scene]) -> tuple[Scene, ...]:
    """Ids are for people to find rows by; where a file uses one twice, the later ones get the line they are from."""
    made: dict[str, Scene] = {}
    for each in scenes:
        name = each.id if each.id not in made else f"{each.id} ({each.origin})"
        made[name] = replace(each, id=name)
    return tuple(made.values())


def _say(path: Path, num_scenes: int, num_rows: int, unused: Counter[str]) -> None:
    left_out = ", ".join(f"{count} {why}" for why, count in unused.most_common() if count)
    decide(
        "data.probes.captions",
        f"{num_scenes} pictures of {num_rows} rows in {path.name}",
        RULE + (f"; not used: {left_out}" if left_out else ""),
    )
