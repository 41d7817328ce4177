"""Files of edits: what the model is to answer otherwise, in which other words and pictures, and what must stay.

Data flow: a JSON list or JSONL -> ``read_edits`` -> ``EditFile`` (rewrites, questions that must stay, rejections).

A row is a question with a constraint, in words or spans, as ``constraints`` has it, and

    {"id": "1", "question": "What is the capital of the country with this flag?", "image": "flags/fr.png",
     "constraint": "this flag", "answer": "Paris", "new_answer": "Rome",
     "paraphrases": ["Which city is the capital of the country that this flag belongs to?"],
     "other_images": ["flags/fr-waving.png"],
     "neighbours": [{"question": "On which continent is the country with this flag?", "image": "flags/fr.png"}]}

    new_answer    what the model is to say. A row without one is a question whose answer must stay, asked after every
                  edit (unrelated)
    paraphrases   other wordings that should get the new answer too
    other_images  other pictures of the same thing that should get it too
    neighbours    question rows near by whose answers must stay; these need no constraint
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_mm.causal.questions.files import QuestionReader
from lightning_mm.causal.questions.question import Question
from lightning_mm.core.errors import UserError
from lightning_mm.data.readers import conversations
from lightning_mm.data.readers.conversations import InvalidRow, RowReader
from lightning_mm.data.sample import Rejection


@dataclass(frozen=True)
class Rewrite:
    """One question and what it should be answered with.

    Args:
        question: As it is.
        new_answer: What the model is to say.
        paraphrases: Other wordings.
        other_images: Other pictures of the same thing, each in place of the question's own.
        neighbours: Questions whose answers must stay.
    """

    question: Question
    new_answer: str
    paraphrases: tuple[str, ...] = ()
    other_images: tuple[tuple[Path, ...], ...] = ()
    neighbours: tuple[Question, ...] = ()


@dataclass(frozen=True)
class EditFile:
    """A file, read.

    Args:
        rewrites: In file order.
        staying: Questions whose answers must stay whatever is edited.
        rejections: Rows that cannot be used.
        num_rows: All rows.
    """

    rewrites: tuple[Rewrite, ...]
    staying: tuple[Question, ...]
    rejections: tuple[Rejection, ...]
    num_rows: int


def read_edits(path: Path | str, image_root: Path | str | None = None) -> EditFile:
    """Read a file of edits.

    Args:
        path: A JSON list or JSONL.
        image_root: The folder that image paths are relative to; the file's own folder if None.

    Raises:
        UserError: No such file, or no edit in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No file of edits {path}.", "It does not exist.", "Check the path given as --edits.")
    root = Path(image_root) if image_root else path.parent
    reader, images = QuestionReader(root), RowReader(root, answers_required=False)
    rewrites: list[Rewrite] = []
    staying: list[Question] = []
    rejections: list[Rejection] = []
    for origin, row in conversations.iter_json_rows(path):
        try:
            made = _row(reader, images, row, origin)
        except InvalidRow as error:
            rejections.append(Rejection(origin, str(error)))
        else:
            (rewrites if isinstance(made, Rewrite) else staying).append(made)  # type: ignore[arg-type]
    if not rewrites:
        first = "\n    ".join(f"{r.origin}: {r.reason}" for r in rejections[:5]) or "No row has a new_answer."
        raise UserError(
            f"{path} holds no edit that can be made.",
            f"{len(rejections)} rows cannot be used, {len(staying)} have no new_answer. {first}",
            'Rows look like {"question": "...", "image": "a.png", "constraint": "...", "new_answer": "..."}.',
        )
    return EditFile(tuple(rewrites), tuple(staying), tuple(rejections), len(rewrites) + len(staying) + len(rejections))


def _row(reader: QuestionReader, images: RowReader, row: Any, origin: str) -> Rewrite | Question:
    if isinstance(row, InvalidRow):
        raise row
    if not isinstance(row, dict):
        raise InvalidRow(f"not an object: {row!r:.60}")
    if row.get("new_answer") is None:
        return _staying(reader, row, origin)
    question = reader.question(row, origin)[0]
    if not question.spans:
        raise InvalidRow("no constraint: the key of an edit is read at the last token of its words")
    near = [_staying(reader, each, f"{origin} neighbours[{i}]") for i, each in enumerate(_list(row, "neighbours"))]
    others = [_images(images, each, f"{origin} other_images[{i}]") for i, each in enumerate(_list(row, "other_images"))]
    paraphrases = [_text({"paraphrases": each}, "paraphrases") for each in _list(row, "paraphrases")]
    return Rewrite(question, _text(row, "new_answer"), tuple(paraphrases), tuple(others), tuple(near))


def _staying(reader: QuestionReader, row: Any, origin: str) -> Question:
    """A question whose answer must stay; its constraint is not needed."""
    if not isinstance(row, dict):
        raise InvalidRow(f"not an object: {row!r:.60}")
    text = _text(row, "question").strip()
    plain = {key: value for key, value in row.items() if key not in ("constraint", "boxes")}
    question = reader.question({**plain, "question": text, "spans": [[0, len(text)]]}, origin)[0]
    return replace(question, spans=())


def _images(reader: RowReader, names: Any, origin: str) -> tuple[Path, ...]:
    told = {"images": names if isinstance(names, list) else [names]}
    return reader.sample({**told, "conversations": [{"from": "human", "value": "?"}]}, origin).images


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
