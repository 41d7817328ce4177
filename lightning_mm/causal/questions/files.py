"""Reads questions with constraints from a file.

Data flow: file -> rows (CSV here, JSON by ``data.readers``) -> ``QuestionReader.read_row``: image files, constraint
positions (``constraint_matching``) -> ``QuestionFile``; rows that cannot be used become rejections with their line.
Reasons read ``category: detail``, so that they can be counted by category.

VQA-Constraints as released (Basu et al. 2024, arXiv:2406.04236): CSV in UTF-8 with an unnamed index column and
``question``, ``main_entity`` (the constraint) and ``image_url``; ``subject`` and ``director`` are ignored, since they
name what only the image shows. An ``answer`` column is used if present. ``image_url`` is never fetched:
``./val2014/a.jpg`` or ``https://host/val2014/a.jpg`` is ``val2014/a.jpg`` in the image root, or ``a.jpg``; a name
without an image suffix ("A photo of Space Needle") is tried with each suffix.

Our own form, in a JSON list or one row per line (JSONL):

    {"id": "7", "image": "a.jpg",
     "question": "What is the capital of the country with this flag?",
     "constraint": "the country with this flag",
     "boxes": [{"name": "flag", "box": [10, 20, 80, 90]}],
     "answer": "Paris.", "group": "FR", "kind": "capital"}

    question    as a person asks it, without image marker
    image       relative to the image root, which it may not leave; ``images`` for several; none for text-only questions
    constraint  words of the question, found by the rules of ``constraint_matching``; a list if there are several
    spans       instead of ``constraint``: [[first character, one past the last], ...] of the stripped question
    boxes       visual constraints: [x0, y0, x1, y1] in pixels of the image as stored
    answer      the correct answer; if missing, the model's own first token is followed
    group       cluster id for confidence intervals; if missing, the image
    kind        question type, for results by type

A row must have a question, and ``constraint``, ``spans`` or ``boxes``.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from lightning_mm.causal.questions import constraint_matching
from lightning_mm.causal.questions.constraint_matching import Span
from lightning_mm.causal.questions.question import Question
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.probe_sets.build import scenes
from lightning_mm.data.probe_sets.files import ObjectBox
from lightning_mm.data.readers import conversations
from lightning_mm.data.readers.image_root import ImageRoot, named_images
from lightning_mm.data.readers.invalid_row import InvalidRow
from lightning_mm.data.sample import IMAGE_MARK, Rejection

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""Image file suffixes; a name with another ending is tried with each of them."""


class QuestionReader:
    """Turns the rows of one file into ``Question``s.

    Args:
        image_root: Folder of the images; paths that leave it are rejected.
    """

    def __init__(self, image_root: Path) -> None:
        self._root = ImageRoot(image_root)
        self._taken: set[str] = set()

    def read_row(self, row: object, origin: str) -> tuple[Question, str]:
        """The question of a row, and the rule by which its constraint was found.

        Args:
            row: A row in the JSON form above, or with ``image_url`` in place of ``image``.
            origin: Where the row comes from, ``file:line``.

        Raises:
            InvalidRow: The row cannot be used; its text is the reason.
        """
        if isinstance(row, InvalidRow):
            raise row
        if not isinstance(row, dict):
            raise InvalidRow("not an object: a row is {...}")
        text = _text_field(row, "question")
        if text is None:
            raise InvalidRow("no question: the row has no 'question'")
        if IMAGE_MARK in text:
            raise InvalidRow(f"misplaced image mark: {IMAGE_MARK} in the question; 'image' names its picture")
        boxes = _boxes(row)
        spans, rule = _spans(row, text, bool(boxes))
        images = self._images(row)
        name = str(origin if row.get("id") in (None, "") else row["id"])
        name = name if name not in self._taken else f"{name} ({origin})"
        self._taken.add(name)
        group = str(row.get("group") or "").strip() or "|".join(map(str, images)) or name
        return Question(
            name,
            text,
            images,
            spans,
            _text_field(row, "answer"),
            boxes,
            group,
            _text_field(row, "kind") or "",
            _first_as_written(row, text, spans),
        ), rule

    def _images(self, row: Mapping[str, Any]) -> tuple[Path, ...]:
        """Image files of a row, inside the image root."""
        if "image_url" not in row:
            return named_images(row, self._root)
        for names in _candidate_names(row["image_url"]):
            found: list[Path] = []
            for name in names:
                try:
                    found.append(self._root.resolve(name))
                except InvalidRow as error:
                    if not str(error).startswith("missing image"):
                        raise
            if len(found) > 1:
                raise InvalidRow(f"picture not unique: it may be {' or '.join(image.name for image in found)}")
            if found:
                return tuple(found)
        raise InvalidRow(f"missing image: {row['image_url']!r} is not in the image root, and nothing is fetched")


def _candidate_names(url: str) -> Iterator[list[str]]:
    """File names that an image may have in the image root, the full path first, then the bare name."""
    path = unquote(urlsplit(url).path) if "://" in url else url.strip()
    parts = [part for part in PurePosixPath(path).parts if part != "/"]
    endings = ("",) if path.lower().endswith(ENDINGS) else ("", *ENDINGS)
    for tail in dict.fromkeys(["/".join(parts), "".join(parts[-1:])]):
        if tail:
            yield [tail + ending for ending in endings]


def _spans(row: Mapping[str, Any], text: str, has_boxes: bool) -> tuple[tuple[Span, ...], str]:
    """Character ranges of the constraints, and the rule that found them."""
    if row.get("spans") is not None:
        return _given_spans(row["spans"], text), "spans"
    given = row.get("constraint")
    constraints = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(each, str) for each in constraints):
        raise InvalidRow(f"wrong type: 'constraint' is {given!r:.60}, not text or a list of texts")
    constraints = [each for each in constraints if each.strip()]
    if not constraints:
        if not has_boxes:
            raise InvalidRow("no constraint: the row has neither 'constraint' nor 'spans' nor 'boxes'")
        return (), "boxes"
    spans: list[Span] = []
    rules = []
    for each in constraints:
        match = constraint_matching.find_constraint(each, text)
        if match is None:
            raise InvalidRow(f"constraint not in the question: {each!r} in {text!r}")
        spans += match.spans
        rules.append(match.rule)
    return constraint_matching.merge_spans(spans), max(rules, key=constraint_matching.RULES.index)


def _first_as_written(row: Mapping[str, Any], text: str, spans: tuple[Span, ...]) -> int:
    """Index of the first place that is written as a constraint of the row is; 0 if none is."""
    given = row.get("constraint")
    written = {each.strip() for each in given} if isinstance(given, list) else {str(given or "").strip()}
    return next((number for number, span in enumerate(spans) if text[slice(*span)] in written), 0)


def _given_spans(given: Any, text: str) -> tuple[Span, ...]:
    pairs = [tuple(pair) if isinstance(pair, list) else () for pair in given] if isinstance(given, list) else []
    for pair in pairs:
        whole = len(pair) == 2 and all(type(edge) is int for edge in pair)
        if not whole or not 0 <= pair[0] < pair[1] <= len(text) or not text[slice(*pair)].strip():
            raise InvalidRow(f"impossible span: {list(pair)} in a question of {len(text)} characters")
    if not pairs:
        raise InvalidRow(f"wrong type: 'spans' is {given!r:.60}, not [[first, one past the last], ...]")
    return constraint_matching.merge_spans([(first, last) for first, last in pairs])


def _boxes(row: Mapping[str, Any]) -> tuple[ObjectBox, ...]:
    objects = scenes._objects(row.get("boxes")) or ()
    for each in objects:
        if each.box is None:
            raise InvalidRow(f"box without a place: {each.name!r}")
    return tuple(ObjectBox(each.name, each.box) for each in objects if each.box is not None)


def _text_field(row: Mapping[str, Any], key: str) -> str | None:
    """A stripped text value; None if it is missing or blank."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise InvalidRow(f"wrong type: {key!r} is {value!r:.60}, not text")
    return (value or "").strip() or None


COLUMNS = ("question", "main_entity", "image_url")
_ROW = (
    'Rows look like {"question": "What colour is the old car?", "constraint": "the old car", "image": "a.jpg"}, and '
    f"CSV has the columns {', '.join(COLUMNS)}; pictures lie in the image root."
)


@dataclass(frozen=True)
class QuestionFile:
    """The contents of a file of questions.

    Args:
        questions: Usable rows, in file order.
        rejected: Rows that cannot be used; reasons read ``category: detail``.
        matched: Question id -> the rule of ``constraint_matching`` that found its constraint (the loosest one, of
            several constraints), ``spans`` or ``boxes``.
    """

    questions: tuple[Question, ...]
    rejected: tuple[Rejection, ...]
    matched: Mapping[str, str]

    @property
    def num_rows(self) -> int:
        """Number of rows, usable or not."""
        return len(self.questions) + len(self.rejected)


def read_questions(path: Path | str, image_root: Path | str | None = None) -> QuestionFile:
    """Read questions with constraints.

    Args:
        path: CSV, JSON or JSONL file; JSON begins with a bracket or a brace.
        image_root: Folder of the images; paths that leave it are rejected; None: the file's own folder.

    Raises:
        UserError: No such file, it is empty, lacks a column or breaks CSV's rules, or no row of it can be used.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No file {path} with questions.", *conversations.missing_file_reason(path))
    reader = QuestionReader(Path(image_root) if image_root else path.parent)
    questions: list[Question] = []
    rejected: list[Rejection] = []
    matched: dict[str, str] = {}
    for origin, row in _rows(path):
        try:
            question, rule = reader.read_row(row, origin)
        except InvalidRow as error:
            rejected.append(Rejection(origin, str(error)))
        else:
            questions.append(question)
            matched[question.id] = rule
    read = QuestionFile(tuple(questions), tuple(rejected), matched)
    _check_any(path, read)
    _log_questions(path, read)
    return read


def _check_any(path: Path, read: QuestionFile) -> None:
    if read.questions:
        return
    if not read.rejected:
        raise UserError(f"{path} is empty.", "It holds no question.", _ROW)
    first = "\n    ".join(f"{each.origin}: {each.reason}" for each in read.rejected[:5])
    raise UserError(
        f"None of the {read.num_rows} rows of {path} can be used.", f"The first of them:\n    {first}", _ROW
    )


def _log_questions(path: Path, read: QuestionFile) -> None:
    """Log how many questions there are, by the rule that found their constraint, and why rows are not used."""
    rules = Counter(read.matched.values()).most_common()
    reasons = Counter(each.reason.partition(":")[0] for each in read.rejected).most_common()
    found = ", ".join(f"{count} {rule}" for rule, count in rules)
    left_out = ", ".join(f"{count} {reason}" for reason, count in reasons)
    log_decision(
        "causal.constraints",
        f"{len(read.questions)} questions of {read.num_rows} rows in {path.name}",
        f"how constraints were found: {found}" + (f"; not used: {left_out}" if left_out else ""),
    )


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row with its origin, in the JSON form."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return conversations.iter_json_rows(path) if head.startswith((b"[", b"{")) else _csv_rows(path)


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Strict: an unclosed quote would otherwise silently take in the rest of the file.
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    line = 1
    try:
        columns = [name.strip() for name in next(reader, [])]
        _check_columns(path, columns)
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield f"{path.name}:{line}", _csv_row(columns, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path} is not CSV.",
            f"The row that begins at line {line}: {error}.",
            "Mend it there: a cell with commas, quotes or line breaks stands in quotes, and quotes in it are doubled.",
        ) from error


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not UTF-8.", f"Line {line}: {error.reason}.", "Save it as UTF-8.") from error


def _check_columns(path: Path, columns: list[str]) -> None:
    missing = [name for name in COLUMNS if columns.count(name) != 1]
    if not any(columns):
        raise UserError(f"{path} is empty.", "It holds no row.", _ROW)
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(map(repr, missing))}, or several.",
            f"Its first line names: {', '.join(map(repr, columns))}.",
            _ROW,
        )


def _csv_row(columns: list[str], cells: list[str]) -> Any:
    """A row of the released CSV files in the JSON form."""
    if len(cells) != len(columns):
        return InvalidRow(f"wrong number of cells: {len(cells)}, the file has {len(columns)} columns")
    named = dict(zip(columns, cells, strict=True))
    row = {key: named[key] for key in ("question", "image_url", "answer", "group", "kind") if key in named}
    return row | {"id": named.get("id", named.get("", "")).strip(), "constraint": named["main_entity"]}
