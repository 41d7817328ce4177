"""COCO's annotation files as rows of our own format: captions and things of each picture, put together.

Data flow: ``captions_*.json`` and ``instances_*.json``, either of which leads to the other -> rows -> ``reading``. What
an annotation holds counts, and not what its file is called: a caption, a thing, or both at once (RefCOCO's).

A box of COCO is x, y, width, height; ours are edges. A crowd region (``iscrowd``) tells that its category is there, but
neither where each one is nor how many there are. The category's ``supercategory`` is the coarser class.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_mm.decisions import decide
from lightning_mm.errors import UserError

_BETWEEN = re.compile(r"[\s,:]*")
_LIST_OF_OBJECTS = re.compile(r"\[\s*[{\]]")
_LISTS = ("images", "annotations", "categories", "licenses")
_KEYS_OF_ROWS = ("image", "conversations", "messages")
File = Mapping[str, Any]
ByPicture = Mapping[int, list[Any]]


def is_coco(head: str) -> bool:
    """Whether a file that begins so is one of COCO's: one object of lists of objects, and not a row, or many of them.

    Example:
        >>> is_coco('{"info": {"year": 2017}, "images": [{"id": 5, "file_')
        True
        >>> is_coco('{"info": {"year": 2017}, "image": "a.jpg", "caption": "a cat"}')
        False
    """
    told = _beginnings(head)
    lists = {key: bool(_LIST_OF_OBJECTS.match(value)) for key, value in told.items() if key in _LISTS}
    if any(key in told for key in _KEYS_OF_ROWS) or not lists.get("images", True):
        return False
    return any(lists.values()) or told.get("info", "").startswith("{")


def _beginnings(head: str) -> dict[str, str]:
    """How the value of each key begins, as far as the text goes."""
    decoder, told = json.JSONDecoder(), dict[str, str]()
    if not head.lstrip().startswith("{"):
        return told
    at = head.index("{") + 1
    try:
        while head[at : at + 1] != "}":
            key, at = decoder.raw_decode(head, _after(head, at))
            at = _after(head, at)
            told[str(key)] = head[at : at + 64]
            _, at = decoder.raw_decode(head, at)
    except (ValueError, RecursionError):  # the text ends here, or is no JSON
        pass
    return told


def _after(text: str, at: int) -> int:
    between = _BETWEEN.match(text, at)
    assert between is not None
    return between.end()


def coco_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows in the order of the picture ids, each with its origin.

    Args:
        path: An annotation file. Of ``captions_<split>.json`` and ``instances_<split>.json`` the other is read too if
            it lies beside it.

    Raises:
        UserError: It is no annotation file of this kind.
    """
    paths = [path, *_beside(path)]
    files = [_file(each) for each in paths]
    pictures = {image["id"]: image["file_name"] for file in reversed(files) for image in file["images"]}
    captions, things = _captions(files), _things(files)
    decide(
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


def _beside(path: Path) -> list[Path]:
    """The file of the other kind with the same ending of its name, if there is one."""
    for own, other in (("captions", "instances"), ("instances", "captions")):
        found = path.with_name(other + path.name.removeprefix(own))
        if path.name.startswith(own) and found.is_file():
            return [found]
    return []


def _file(path: Path) -> File:
    try:
        told = json.loads(path.read_text(encoding="utf-8-sig"))
        _check(told)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not one of COCO's annotation files.",
            f"{type(error).__name__}: {error}.",
            "Name captions_*.json or instances_*.json; panoptic files are of another kind.",
        ) from error
    assert isinstance(told, dict)
    return told


def _check(told: Any) -> None:
    """Raise what ``_file`` explains where something that is read later is not there or of another type."""
    for image in told["images"]:
        if not isinstance(image["id"], int) or not isinstance(image["file_name"], str):
            raise TypeError(f"a picture is {image!r:.80}")
    known = {each["id"] for each in told.get("categories", ()) if isinstance(each["name"], str)}
    for each in told["annotations"]:
        is_caption = isinstance(each.get("caption"), str)
        if not isinstance(each["image_id"], int) or not (is_caption or each.get("category_id") in known):
            raise TypeError(f"an annotation is {each!r:.80}")


def _captions(files: list[File]) -> ByPicture:
    """Captions by picture, without their full stops; blank ones, which COCO has, left out."""
    found: dict[int, list[Any]] = defaultdict(list)
    for each in (each for file in files for each in file["annotations"]):
        caption = each.get("caption")
        if isinstance(caption, str) and (said := caption.strip().rstrip(".")):
            found[each["image_id"]].append(said)
    return dict(found)


def _things(files: list[File]) -> ByPicture:
    """Things by picture, for the pictures that a file of things lists: where it knows of none, none is there."""
    found: dict[int, list[Any]] = {}
    for file in files:
        categories = {each["id"]: each for each in file.get("categories", ())}
        told = [each for each in file["annotations"] if each.get("category_id") in categories]
        for image in file["images"] if told else ():
            found.setdefault(image["id"], [])
        for each in told:
            things = found.setdefault(each["image_id"], [])
            if (thing := _thing(each, categories)) not in things:  # one thing may be told of in several captions
                things.append(thing)
    return found


def _thing(told: Mapping[str, Any], categories: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    category = categories[told["category_id"]]
    box = None if told.get("iscrowd") else _edges(told.get("bbox"))
    return {"name": category["name"], "category": category.get("supercategory"), "box": box}


def _edges(box: object) -> list[float] | None:
    """x0, y0, x1, y1; None where the box is of no area, as some of COCO's are, or of less than the first pixel."""
    sides = box if isinstance(box, list) else []
    if len(sides) != 4 or not all(isinstance(side, int | float) and math.isfinite(side) for side in sides):
        return None
    x, y, width, height = sides
    return [x, y, x + width, y + height] if width > 0 and height > 0 and max(x + width, y + height) > 1 else None
