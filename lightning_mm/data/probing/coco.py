"""COCO's annotation files as rows of our own format: captions and things of each picture, put together.

Data flow: ``captions_*.json`` and ``instances_*.json``, either of which leads to the other -> rows -> ``reading``.

A box of COCO is x, y, width, height; ours are edges. A crowd region (``iscrowd``) tells that its category is there, but
neither where each one is nor how many there are. The category's ``supercategory`` is the coarser class.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_mm.decisions import decide
from lightning_mm.errors import UserError

_LISTS = re.compile(r'"(images|annotations|categories|licenses)":\s*\[\s*\{|"info":\s*\{')
Annotations = Mapping[int, list[Mapping[str, Any]]]


def is_coco(head: str) -> bool:
    """Whether a file that begins so can be one of COCO's: one object of lists of objects, not a list of rows."""
    return head.lstrip().startswith("{") and bool(_LISTS.search(head))


def coco_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows in the order of the picture ids, each with its origin.

    Args:
        path: ``captions_<split>.json`` or ``instances_<split>.json``; the other is read too if it lies beside it.

    Raises:
        UserError: It is no annotation file of this kind.
    """
    kinds = {"captions": _beside(path, "captions"), "instances": _beside(path, "instances")}
    files = {kind: _file(found) for kind, found in kinds.items() if found is not None}
    if not files:
        files = {"captions" if _is_caption_file(_file(path)) else "instances": _file(path)}
    decide("data.probes", " + ".join(sorted(files)), f"the COCO annotation files {path.name} and what lies beside it")
    pictures = {image["id"]: image["file_name"] for file in files.values() for image in file["images"]}
    captions = _by_picture(files.get("captions"))
    things = _by_picture(files.get("instances"))
    categories = {each["id"]: each for each in files.get("instances", {}).get("categories", ())}
    for number, name in sorted(pictures.items()):
        row: dict[str, Any] = {"id": str(number), "image": name}
        if "captions" in files:
            row["caption"] = [each["caption"].strip().rstrip(".") for each in captions.get(number, ())] or None
        if "instances" in files:
            row["objects"] = [_object(each, categories) for each in things.get(number, ())]
        yield f"{path.name}:image {number}", row


def _beside(path: Path, kind: str) -> Path | None:
    """The file of this kind with the same ending of its name."""
    for own in ("captions", "instances"):
        if path.name.startswith(own):
            found = path.with_name(kind + path.name.removeprefix(own))
            return found if found.is_file() else None
    return None


def _file(path: Path) -> Mapping[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8-sig"))
        _check(told)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not one of COCO's annotation files.",
            f"{type(error).__name__}: {error}.",
            "Name captions_*.json or instances_*.json; person_keypoints and panoptic files are of another kind.",
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


def _is_caption_file(told: Mapping[str, Any]) -> bool:
    return any("caption" in each for each in told["annotations"][:1])


def _by_picture(told: Mapping[str, Any] | None) -> Annotations:
    found: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for each in told["annotations"] if told else ():
        found[each["image_id"]].append(each)
    return found


def _object(told: Mapping[str, Any], categories: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    category = categories[told["category_id"]]
    made = {"name": category["name"], "category": category.get("supercategory"), "box": None}
    if not told.get("iscrowd") and isinstance(box := told.get("bbox"), list) and len(box) == 4:
        x, y, width, height = box
        made["box"] = [x, y, x + width, y + height]
    return made
