"""One row of a file into a Question, or the reason why not.

Data flow: ``constraints`` hands in each decoded row; ``QuestionReader.question`` finds and confines its pictures
(``rows``), finds its constraints in the text (``matching``), and returns a Question or raises ``BadRow``.

Reasons read ``category: detail``, so that the ledger can count by category.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from lightning_mm.causal import matching
from lightning_mm.causal.matching import Span
from lightning_mm.causal.questions import Question
from lightning_mm.data.probe_rows import ObjectBox
from lightning_mm.data.probing import scenes
from lightning_mm.data.rows import BadRow, RowReader
from lightning_mm.data.sample import IMAGE_MARK

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""What a picture's name may end in; one that ends otherwise is looked for with each of them."""


class QuestionReader:
    """Reads the rows of one file.

    Args:
        image_root: The folder that pictures lie in and may not leave.
    """

    def __init__(self, image_root: Path) -> None:
        self._rows = RowReader(image_root, answers_required=False)
        self._taken: set[str] = set()

    def question(self, row: object, origin: str) -> tuple[Question, str]:
        """The question, and the rule by which its constraint was found.

        Args:
            row: Our own form, or one with ``image_url`` in place of ``image``.
            origin: ``file:line``.

        Raises:
            BadRow: It cannot be used.
        """
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, dict):
            raise BadRow("not an object: a row is {...}")
        text = _text(row, "question")
        if text is None:
            raise BadRow("no question: the row has no 'question'")
        if IMAGE_MARK in text:
            raise BadRow(f"misplaced image mark: {IMAGE_MARK} in the question; 'image' names its picture")
        boxes = _boxes(row)
        spans, rule = _spans(row, text, bool(boxes))
        images = self._images(row, origin)
        name = str(origin if row.get("id") in (None, "") else row["id"])
        name = name if name not in self._taken else f"{name} ({origin})"
        self._taken.add(name)
        group = str(row.get("group") or "").strip() or "|".join(map(str, images)) or name
        return Question(name, text, images, spans, _text(row, "answer"), boxes, group, _text(row, "kind") or ""), rule

    def _images(self, row: Mapping[str, Any], origin: str) -> tuple[Path, ...]:
        """The pictures, confined to the image root."""
        named = {key: row[key] for key in ("image", "images") if row.get(key) is not None}
        asked = {"conversations": [{"from": "human", "value": "What?"}]}
        if "image_url" not in row:
            return self._rows.sample({**named, **asked}, origin).images
        for names in _places(row["image_url"]):
            found: list[Path] = []
            for name in names:
                try:
                    found += self._rows.sample({"image": name, **asked}, origin).images
                except BadRow as error:
                    if not str(error).startswith("missing image"):
                        raise
            if len(found) > 1:
                raise BadRow(f"picture not unique: it may be {' or '.join(image.name for image in found)}")
            if found:
                return tuple(found)
        raise BadRow(f"missing image: {row['image_url']!r} is not in the image root, and nothing is fetched")


def _places(url: str) -> Iterator[list[str]]:
    """Names that the picture may have in the image root, the likelier ones first."""
    path = unquote(urlsplit(url).path) if "://" in url else url.strip()
    parts = [part for part in PurePosixPath(path).parts if part != "/"]
    endings = ("",) if path.lower().endswith(ENDINGS) else ("", *ENDINGS)
    for tail in dict.fromkeys(["/".join(parts), "".join(parts[-1:])]):
        if tail:
            yield [tail + ending for ending in endings]


def _spans(row: Mapping[str, Any], text: str, has_boxes: bool) -> tuple[tuple[Span, ...], str]:
    """Where the constraints stand, and the rule that says so."""
    if row.get("spans") is not None:
        return _given_spans(row["spans"], text), "spans"
    told = row.get("constraint")
    constraints = told if isinstance(told, list) else [] if told is None else [told]
    if not all(isinstance(each, str) for each in constraints):
        raise BadRow(f"wrong type: 'constraint' is {told!r:.60}, not text or a list of texts")
    constraints = [each for each in constraints if each.strip()]
    if not constraints:
        if not has_boxes:
            raise BadRow("no constraint: the row has neither 'constraint' nor 'spans' nor 'boxes'")
        return (), "boxes"
    spans: list[Span] = []
    rules = []
    for each in constraints:
        found = matching.find(each, text)
        if found is None:
            raise BadRow(f"constraint not in the question: {each!r} in {text!r}")
        spans += found.spans
        rules.append(found.rule)
    return matching.joined(spans), max(rules, key=matching.RULES.index)


def _given_spans(told: Any, text: str) -> tuple[Span, ...]:
    pairs = [tuple(pair) if isinstance(pair, list) else () for pair in told] if isinstance(told, list) else []
    for pair in pairs:
        whole = len(pair) == 2 and all(type(edge) is int for edge in pair)
        if not whole or not 0 <= pair[0] < pair[1] <= len(text) or not text[slice(*pair)].strip():
            raise BadRow(f"impossible span: {list(pair)} in a question of {len(text)} characters")
    if not pairs:
        raise BadRow(f"wrong type: 'spans' is {told!r:.60}, not [[first, one past the last], ...]")
    return matching.joined([(first, last) for first, last in pairs])


def _boxes(row: Mapping[str, Any]) -> tuple[ObjectBox, ...]:
    found = scenes._objects(row.get("boxes")) or ()
    for each in found:
        if each.box is None:
            raise BadRow(f"box without a place: {each.name!r}")
    return tuple(ObjectBox(each.name, each.box) for each in found if each.box is not None)


def _text(row: Mapping[str, Any], key: str) -> str | None:
    """A value without blanks around it; None where there is none."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRow(f"wrong type: {key!r} is {value!r:.60}, not text")
    return (value or "").strip() or None
