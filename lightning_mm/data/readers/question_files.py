"""Files of questions and captions as their benchmarks release them, whose rows are in two lists or two files.

    VQAv2, OK-VQA   {"questions": [{"image_id", "question", "question_id"}]}, and the answers in a file beside it:
                    {"annotations": [{"question_id", "multiple_choice_answer", "answers", ...}]}
    COCO captions   {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}

Data flow: the object of a file -> ``joined_rows`` -> one row per question or caption, with its picture; None for other
files. GQA, TextVQA, DocVQA, ChartQA and others need no joining: ``object_rows`` and ``questions`` read them.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_mm.core.errors import UserError

_WORDS = ("questions", "annotations")


def is_joined(value: dict[str, Any]) -> bool:
    """Whether the rows of a file are in two lists, or in two files."""
    return _is_questions(value) or _is_answers(value) or _is_captions(value)


def files_of(path: Path, value: dict[str, Any]) -> tuple[Path, ...]:
    """The file, and the one with the other half of its rows, if it is there.

    Args:
        path: The file.
        value: Its object.
    """
    if _is_questions(value) or _is_answers(value):
        other = _sibling(path, *(_WORDS if _is_questions(value) else _WORDS[::-1]))
        return (path, other) if other is not None else (path,)
    return (path,)


def joined_rows(
    path: Path, name: str, value: dict[str, Any], other: dict[str, Any] | None, answers_required: bool
) -> Iterator[tuple[str, Any]]:
    """Origin and row of each question or caption.

    Args:
        path: The file.
        name: What it is called in origins.
        value: Its object.
        other: The object of the file with the other half; None if there is none.
        answers_required: Whether questions without answers are of no use.

    Raises:
        UserError: The file with the answers, or that with the questions, is not beside it.
    """
    if _is_captions(value):
        yield from _captions(name, value)
        return
    questions, answers = (value, other) if _is_questions(value) else (other, value)
    if questions is None or (answers is None and answers_required):
        have, lack = _WORDS if questions is not None else _WORDS[::-1]
        raise UserError(
            f"{path} has no {'answers' if lack == 'annotations' else 'questions'}.",
            f"It is VQAv2's file of {have}; that of the {lack} is not beside it.",
            f"Put it there, under the same name with {lack} in place of {have}.",
        )
    yield from _vqa(name, questions, answers or {"annotations": []})


def _vqa(name: str, questions: dict[str, Any], answers: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    by_question = {each["question_id"]: each for each in answers["annotations"] if "question_id" in each}
    images = str(questions.get("data_subtype") or answers.get("data_subtype") or "")
    images = re.sub(r"^test-dev", "test", images)  # its pictures are those of test2015
    for index, question in enumerate(questions["questions"]):
        answer = by_question.get(question.get("question_id"), {})
        row = {"id": question.get("question_id"), **answer, **question}
        if images and isinstance(row.get("image_id"), int):
            row["image"] = f"COCO_{images}_{row.pop('image_id'):012d}.jpg"
        row["question_type"] = answer.get("answer_type") or answer.get("question_type") or "any"
        yield f"{name}:questions[{index}]", row


def _captions(name: str, value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    files = {each.get("id"): each.get("file_name") for each in value["images"]}
    for index, annotation in enumerate(value["annotations"]):
        row = {
            "id": annotation.get("id"),
            "image": files.get(annotation.get("image_id")),
            "caption": annotation["caption"],
        }
        yield f"{name}:annotations[{index}]", {**annotation, **row}


def _is_questions(value: dict[str, Any]) -> bool:
    first = _first(value, "questions")
    return "question_id" in first and "image_id" in first and "answer" not in first


def _is_answers(value: dict[str, Any]) -> bool:
    first = _first(value, "annotations")
    return "questions" not in value and "question_id" in first and "question" not in first


def _is_captions(value: dict[str, Any]) -> bool:
    return "caption" in _first(value, "annotations") and "id" in _first(value, "images")


def _first(value: dict[str, Any], key: str) -> dict[str, Any]:
    rows = value.get(key)
    return rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}


def _sibling(path: Path, mine: str, other: str) -> Path | None:
    """The file of the other half: the only one whose name differs as VQAv2's names do."""

    def normal(name: str) -> str:
        # v2_OpenEnded_mscoco_train2014_questions.json and v2_mscoco_train2014_annotations.json
        return re.sub(r"(openended|multiplechoice)_?", "", name.casefold())

    wanted = normal(path.name).replace(mine, other)
    names = [file for file in sorted(path.parent.iterdir()) if normal(file.name) == wanted and file != path]
    return names[0] if len(names) == 1 and mine in normal(path.name) else None
