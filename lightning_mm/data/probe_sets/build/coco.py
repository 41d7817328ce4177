"""Reads any file with annotated images into Scenes: our own rows, LLaVA's, or COCO's annotation files.

Our rows, one per image, in a JSON list or one per line (JSONL):

    {"id": "7", "image": "a.jpg",
     "caption": "a cat on a chair",
     "false_captions": ["a dog on a chair"],
     "objects": [{"name": "cat", "category": "animal", "box": [10, 20, 80, 90]}, {"name": "chair"}],
     "group": "12"}

    image           path relative to the image root, which it may not leave; the only required key
    caption         true of the image; a text, or a list of several of which one is used
    false_captions  nearly true captions; made from other images' captions where missing
    objects         all objects: what is not listed counts as absent; ``box`` is [x0, y0, x1, y1] in pixels of the image
                    as stored, or missing if not known; ``category`` (and ``group``) are coarser names
    group           rows that depend on one another (frames of one video, images that exchange captions): no split
                    divides them, and they exchange captions among themselves, or all with those of one other group

Conversations (the nano data, LLaVA's) may have the same keys (or ``boxes``, ``caption_swapped``); without a
``caption``, an answer may be one by the rule of ``scenes.caption_from_answer``.

COCO: ``captions_*.json`` and ``instances_*.json``, either of which leads to the other. The content of an annotation
counts, not the name of its file: a caption, an object, or both (RefCOCO). COCO's boxes are x, y, width, height. A crowd
region (``iscrowd``) says that its category is present, not where or how many. ``supercategory`` is the coarser class.

Data flow: file -> ``coco_rows`` or ``iter_json_rows`` -> checked Samples (``RowReader``) -> ``scene_of_sample`` ->
``SceneFile`` -> ``sampling``.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.probe_sets.build.sampling import incomplete_group
from lightning_mm.data.probe_sets.build.scenes import RULE, NotProbeable, Scene, scene_of_sample
from lightning_mm.data.readers import conversations
from lightning_mm.data.readers.image_root import ImageRoot, named_images
from lightning_mm.data.readers.invalid_row import InvalidRow
from lightning_mm.data.readers.row_reader import RowReader
from lightning_mm.data.sample import Rejection, Sample

_SEPARATORS = re.compile(r"[\s,:]*")
_LIST_OF_OBJECTS = re.compile(r"\[\s*[{\]]")
_LISTS = ("images", "annotations", "categories", "licenses")
_KEYS_OF_ROWS = ("image", "conversations", "messages")
AnnotationFile = Mapping[str, Any]
ByImage = Mapping[int, list[Any]]


def is_coco(head: str) -> bool:
    """Whether a file with this beginning is one of COCO's: a single object with lists of objects.

    Example:
        >>> is_coco('{"info": {"year": 2017}, "images": [{"id": 5, "file_')
        True
        >>> is_coco('{"info": {"year": 2017}, "image": "a.jpg", "caption": "a cat"}')
        False
    """
    prefixes = _value_prefixes(head)
    lists = {key: bool(_LIST_OF_OBJECTS.match(value)) for key, value in prefixes.items() if key in _LISTS}
    if any(key in prefixes for key in _KEYS_OF_ROWS) or not lists.get("images", True):
        return False
    return any(lists.values()) or prefixes.get("info", "").startswith("{")


def _value_prefixes(head: str) -> dict[str, str]:
    """Key -> beginning of its value, as far as the text goes."""
    decoder, prefixes = json.JSONDecoder(), dict[str, str]()
    if not head.lstrip().startswith("{"):
        return prefixes
    at = head.index("{") + 1
    try:
        while head[at : at + 1] != "}":
            key, at = decoder.raw_decode(head, _skip_separators(head, at))
            at = _skip_separators(head, at)
            prefixes[str(key)] = head[at : at + 64]
            _, at = decoder.raw_decode(head, at)
    except (ValueError, RecursionError):  # the text ends here, or is not JSON
        pass
    return prefixes


def _skip_separators(text: str, at: int) -> int:
    between = _SEPARATORS.match(text, at)
    assert between is not None
    return between.end()


def coco_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows in the order of the image ids, each with its origin.

    Args:
        path: An annotation file; ``captions_<split>.json`` and ``instances_<split>.json`` beside it are read together.

    Raises:
        UserError: It is not such a file.
    """
    paths = [path, *_companion_file(path)]
    files = [_load_annotations(each) for each in paths]
    pictures = {image["id"]: image["file_name"] for file in reversed(files) for image in file["images"]}
    captions, things = _captions(files), _objects(files)
    log_decision(
        "data.probes",
        f"{len(captions)} pictures with captions, {len(things)} with known things",
        f"COCO's annotations in {' and '.join(each.name for each in paths)}",
    )
    for number, name in sorted(pictures.items()):
        row: dict[str, Any] = {"id": str(number), "image": name}
        if number in captions:
            row["caption"] = captions[number]
        if number in things:
            row["objects"] = things[number]
        yield f"{path.name}:image {number}", row


def _companion_file(path: Path) -> list[Path]:
    """The file of the other kind with the same suffix, if there is one."""
    for own, other in (("captions", "instances"), ("instances", "captions")):
        found = path.with_name(other + path.name.removeprefix(own))
        if path.name.startswith(own) and found.is_file():
            return [found]
    return []


def _load_annotations(path: Path) -> AnnotationFile:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        _check(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not one of COCO's annotation files.",
            f"{type(error).__name__}: {error}.",
            "Name captions_*.json or instances_*.json; panoptic files are of another kind.",
        ) from error
    assert isinstance(content, dict)
    return content


def _check(content: Any) -> None:
    """Raise where something that is read later is missing or of another type."""
    for image in content["images"]:
        if not isinstance(image["id"], int) or not isinstance(image["file_name"], str):
            raise TypeError(f"a picture is {image!r:.80}")
    known = {each["id"] for each in content.get("categories", ()) if isinstance(each["name"], str)}
    for each in content["annotations"]:
        is_caption = isinstance(each.get("caption"), str)
        if not isinstance(each["image_id"], int) or not (is_caption or each.get("category_id") in known):
            raise TypeError(f"an annotation is {each!r:.80}")


def _captions(files: list[AnnotationFile]) -> ByImage:
    """Captions by image, without full stops; blank ones, which COCO has, left out."""
    found: dict[int, list[Any]] = defaultdict(list)
    for each in (each for file in files for each in file["annotations"]):
        caption = each.get("caption")
        if isinstance(caption, str) and (said := caption.strip().rstrip(".")):
            found[each["image_id"]].append(said)
    return dict(found)


def _objects(files: list[AnnotationFile]) -> ByImage:
    """Objects by image, for the images listed by a file with objects: an image without any has none."""
    found: dict[int, list[Any]] = {}
    for file in files:
        categories = {each["id"]: each for each in file.get("categories", ())}
        annotations = [each for each in file["annotations"] if each.get("category_id") in categories]
        for image in file["images"] if annotations else ():
            found.setdefault(image["id"], [])
        for each in annotations:
            things = found.setdefault(each["image_id"], [])
            if (
                thing := _object(each, categories)
            ) not in things:  # one thing may be annotations of in several captions
                things.append(thing)
    return found


def _object(annotation: Mapping[str, Any], categories: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    category = categories[annotation["category_id"]]
    box = None if annotation.get("iscrowd") else _box_edges(annotation.get("bbox"))
    return {"name": category["name"], "category": category.get("supercategory"), "box": box}


def _box_edges(box: object) -> list[float] | None:
    """x0, y0, x1, y1; None for a box without area, as some of COCO's, or within the first pixel."""
    sides = box if isinstance(box, list) else []
    if len(sides) != 4 or not all(isinstance(side, int | float) and math.isfinite(side) for side in sides):
        return None
    x, y, width, height = sides
    return [x, y, x + width, y + height] if width > 0 and height > 0 and max(x + width, y + height) > 1 else None


@dataclass(frozen=True)
class SceneFile:
    """The content of a file.

    Args:
        scenes: One per image, in file order.
        rejections: Rows that are invalid.
        num_rows: Number of all rows, also of those without annotations.
    """

    scenes: tuple[Scene, ...]
    rejections: tuple[Rejection, ...]
    num_rows: int


def read_scenes(path: Path | str, image_root: Path | str | None = None) -> SceneFile:
    """The scenes of a file with annotated images.

    Args:
        path: A file in one of the formats above.
        image_root: Folder that image paths are relative to; None takes the file's own folder.

    Raises:
        UserError: There is no such file, or it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"No file {path} to draw probes from.",
            conversations.missing_file_reason(path)[0],
            "Name a file that is there: --data.probes FILE, or probes= in Python.",
        )
    root = ImageRoot(Path(image_root) if image_root else path.parent)
    reader = RowReader(root.root, answers_required=False)

    def made() -> Iterator[tuple[str, str, Callable[[], Scene]]]:
        for origin, row in _rows(path):
            yield (
                origin,
                str(row.get("group", "")) if isinstance(row, dict) else "",
                partial(_scene, reader, root, row, origin),
            )

    return _scene_file(path.name, made())


def scenes_of_samples(samples: Iterable[Sample], name: str) -> SceneFile:
    """The scenes of conversations that have been read.

    Args:
        samples: Conversations, most of which describe a picture.
        name: What they are called in messages.
    """
    return _scene_file(
        name,
        ((each.origin, str(each.extra.get("group", "")), partial(_scene_of_conversation, each)) for each in samples),
    )


def _scene_file(name: str, rows: Iterable[tuple[str, str, Callable[[], Scene]]]) -> SceneFile:
    """The scenes of rows, each with its origin, its group and what makes its scene."""
    scenes: dict[Path, Scene] = {}
    rejections: list[Rejection] = []
    unused: Counter[str] = Counter()
    num_rows, torn = 0, set[str]()
    for origin, group, make in rows:
        num_rows += 1
        try:
            found = make()
        except InvalidRow as error:
            rejections.append(Rejection(origin, str(error)))
            torn.add(group)
        except NotProbeable as why:
            unused[str(why)] += 1
        else:
            known = scenes.get(found.image)
            unused["further rows about the same picture"] += known is not None
            if known is None or found.richness > known.richness:
                scenes[found.image] = found
    torn &= {each.group for each in scenes.values() if each.group and each.false_captions}
    rejections += [incomplete_group(each) for each in scenes.values() if each.group in torn]
    whole = [each for each in scenes.values() if each.group not in torn]
    _log_scenes(name, len(whole), num_rows, unused)
    return SceneFile(_with_unique_ids(whole), tuple(rejections), num_rows)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        head = file.read(65536).decode("utf-8-sig", errors="replace")
    return coco_rows(path) if is_coco(head) else conversations.iter_json_rows(path)


def _scene(reader: RowReader, root: ImageRoot, row: Any, origin: str) -> Scene:
    if isinstance(row, dict) and "conversations" not in row and "messages" not in row:
        if row.get("image") is None:
            raise InvalidRow("no picture: the row has no 'image'")
        extra = {key: value for key, value in row.items() if key not in ("id", "image", "images")}
        return scene_of_sample(Sample(str(row.get("id", origin)), (), named_images(row, root), origin, extra))
    return _scene_of_conversation(reader.sample(row, origin))


def _scene_of_conversation(sample: Sample) -> Scene:
    try:
        return scene_of_sample(sample)
    except InvalidRow as error:  # a conversation may have such keys with another meaning
        raise NotProbeable(f"conversations whose keys say something else ({str(error).partition(':')[0]})") from error


def _with_unique_ids(scenes: Iterable[Scene]) -> tuple[Scene, ...]:
    """The scenes with unique ids; a repeated id gets the line it is from."""
    made: dict[str, Scene] = {}
    for each in scenes:
        name = each.id if each.id not in made else f"{each.id} ({each.origin})"
        made[name] = replace(each, id=name)
    return tuple(made.values())


def _log_scenes(name: str, num_scenes: int, num_rows: int, unused: Counter[str]) -> None:
    left_out = ", ".join(f"{count} {why}" for why, count in unused.most_common() if count)
    log_decision(
        "data.probes.captions",
        f"{num_scenes} pictures of {num_rows} rows in {name}",
        RULE + (f"; not used: {left_out}" if left_out else ""),
    )
