"""Reads files of edits: new answers to questions, paraphrases and images to test them with, and answers that must stay.

Data flow: JSON list or JSONL -> ``read_edits`` -> ``EditFile`` (edit requests, locality questions, rejections).

A row is a question with a constraint, in words or spans, as ``causal.questions.files`` documents it, and

    {"id": "1", "question": "What is the capital of the country with this flag?", "image": "flags/fr.png",
     "constraint": "this flag", "answer": "Paris", "new_answer": "Rome",
     "paraphrases": ["Which city is the capital of the country that this flag belongs to?"],
     "other_images": ["flags/fr-waving.png"],
     "neighbours": [{"question": "On which continent is the country with this flag?", "image": "flags/fr.png"}]}

    new_answer    answer that the edited model should give. A row without it is a locality question, asked after every
                  edit (unrelated), whose answer must not change
    paraphrases   other wordings that should get the new answer too
    other_images  other images of the same object that should get it too
    neighbours    related questions whose answers must not change; these need no constraint
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_mm.causal.questions.files import QuestionReader
from lightning_mm.causal.questions.question import Question
from lightning_mm.core.errors import UserError
from lightning_mm.data.readers import conversations
from lightning_mm.data.readers.image_root import ImageRoot, named_images
from lightning_mm.data.readers.invalid_row import InvalidRow
from lightning_mm.data.sample import Rejection


@dataclass(frozen=True)
class EditRequest:
    """One edit to make: a question and its new answer.

    Args:
        question: The edited question, with a constraint.
        new_answer: Answer that the edited model should give.
        paraphrases: Other wordings of the question, which should get the new answer too.
        other_images: Images of the same object, each to replace the question's own, which should get it too.
        neighbors: Related questions whose answers must not change.
    """

    question: Question
    new_answer: str
    paraphrases: tuple[str, ...] = ()
    other_images: tuple[tuple[Path, ...], ...] = ()
    neighbors: tuple[Question, ...] = ()


@dataclass(frozen=True)
class EditFile:
    """The contents of a file of edits.

    Args:
        requests: Edits, in file order.
        locality: Unrelated questions, whose answers must not change by any edit.
        rejections: Rows that cannot be used, with reasons.
        num_rows: Number of rows, usable or not.
    """

    requests: tuple[EditRequest, ...]
    locality: tuple[Question, ...]
    rejections: tuple[Rejection, ...]
    num_rows: int


def read_edits(path: Path | str, image_root: Path | str | None = None) -> EditFile:
    """Read a file of edits.

    Args:
        path: A JSON list or JSONL.
        image_root: Folder that image paths are relative to; None: the file's own folder.

    Raises:
        UserError: There is no such file, or it has no usable edit.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No file of edits {path}.", "It does not exist.", "Check the path given as --edits.")
    root = Path(image_root) if image_root else path.parent
    reader, images = QuestionReader(root), ImageRoot(root)
    requests: list[EditRequest] = []
    locality: list[Question] = []
    rejections: list[Rejection] = []
    for origin, row in conversations.iter_json_rows(path):
        try:
            parsed = _parse_row(reader, images, row, origin)
        except InvalidRow as error:
            rejections.append(Rejection(origin, str(error)))
        else:
            (requests if isinstance(parsed, EditRequest) else locality).append(parsed)  # type: ignore[arg-type]
    if not requests:
        first = "\n    ".join(f"{r.origin}: {r.reason}" for r in rejections[:5]) or "No row has a new_answer."
        raise UserError(
            f"{path} holds no edit that can be made.",
            f"{len(rejections)} rows cannot be used, {len(locality)} have no new_answer. {first}",
            'Rows look like {"question": "...", "image": "a.png", "constraint": "...", "new_answer": "..."}.',
        )
    return EditFile(
        tuple(requests), tuple(locality), tuple(rejections), len(requests) + len(locality) + len(rejections)
    )


def _parse_row(reader: QuestionReader, images: ImageRoot, row: Any, origin: str) -> EditRequest | Question:
    if isinstance(row, InvalidRow):
        raise row
    if not isinstance(row, dict):
        raise InvalidRow(f"not an object: {row!r:.60}")
    if row.get("new_answer") is None:
        return _locality_question(reader, row, origin)
    question = reader.read_row(row, origin)[0]
    if not question.spans:
        raise InvalidRow("no constraint: the key of an edit is read at the last token of its words")
    near = [
        _locality_question(reader, each, f"{origin} neighbours[{i}]") for i, each in enumerate(_list(row, "neighbours"))
    ]
    others = [named_images({"images": each}, images) for each in _list(row, "other_images")]
    paraphrases = [_text({"paraphrases": each}, "paraphrases") for each in _list(row, "paraphrases")]
    return EditRequest(question, _text(row, "new_answer"), tuple(paraphrases), tuple(others), tuple(near))


def _locality_question(reader: QuestionReader, row: Any, origin: str) -> Question:
    """A question whose answer must not change; it needs no constraint."""
    if not isinstance(row, dict):
        raise InvalidRow(f"not an object: {row!r:.60}")
    text = _text(row, "question").strip()
    plain = {key: value for key, value in row.items() if key not in ("constraint", "boxes")}
    question = reader.read_row({**plain, "question": text, "spans": [[0, len(text)]]}, origin)[0]
    return replace(question, spans=())


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InvalidRow(f"wrong type: {key!r} is {value!r:.60}, not text")
    return value


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    value = row.get(key) or []
    if not isinstance(value, list):
        raise InvalidRow(f"wrong type: {key!r} is {value!r:.60}, not a list")
    return value
