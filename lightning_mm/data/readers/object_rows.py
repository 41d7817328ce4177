"""Rows of a JSON file that is one object: a list under a key, rows by id, columns, or a single row.

Data flow: path -> ``load_object`` -> ``rows_of_object`` -> rows with origins. Such a file is loaded at once; the forms
of ``question_files`` (VQAv2, COCO captions) are recognized before.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mm.core.errors import UserError
from lightning_mm.data.readers.compression import open_bytes
from lightning_mm.data.readers.invalid_row import InvalidRow
from lightning_mm.data.readers.question_files import is_joined, joined_rows
from lightning_mm.data.readers.row_files import FilePart, RowFile
from lightning_mm.data.readers.shapes import find_shape
from lightning_mm.data.readers.splits import choose_split
from lightning_mm.data.readers.training_marks import refuse_preference


@dataclass(frozen=True)
class JsonObject(RowFile):
    """A JSON file that is one object.

    Args:
        path: The file.
        name: What it is called in origins.
        option: What its rows are for: train, validation, test or predict.
        split: The split that the user named, where its keys are splits.
        columns: Our name -> the file's column.
        answers_required: Whether questions without answers are of no use.
        others: The file with the other half of its rows, if that is how it is released.
    """

    option: str = "train"
    split: str | None = None
    columns: Mapping[str, str] | None = None
    answers_required: bool = True
    others: tuple[Path, ...] = ()
    format = "JSON object"

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, and the one with the other half of its rows."""
        return (self.path, *self.others)

    def rows(self, part: FilePart) -> Iterator[tuple[str, Any]]:
        value = load_object(self.path)
        if is_joined(value):
            other = load_object(self.others[0]) if self.others else None
            yield from joined_rows(self.path, self.name, value, other, self.answers_required)
        else:
            yield from rows_of_object(value, self)


def load_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        UserError: It is not JSON.
    """
    constants: list[str] = []
    with open_bytes(path) as file:
        content = file.read()
    try:
        value = json.loads(content.decode("utf-8-sig"), parse_constant=constants.append)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8.", f"Byte {error.start}: {error.reason}.", "Save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON.", f"{error}.", "Mend it there.") from error
    if constants:
        raise UserError(f"{path} is not JSON.", f"{constants[0]} is no JSON number.", "Write null in its place.")
    assert isinstance(value, dict)
    return value


_SPLITS = frozenset({"train", "training", "validation", "val", "valid", "dev", "minival", "test", "testing", "predict"})


def rows_of_object(value: dict[str, Any], file: JsonObject) -> Iterator[tuple[str, Any]]:
    """The rows of an object.

    Args:
        value: The object.
        file: Where it is from.

    Raises:
        UserError: It is not clear what its rows are.
    """
    if _is_row(value, file.columns or {}):
        yield f"{file.name}:1", value
        return
    lists = {key: each for key, each in value.items() if _is_rows(each)}
    if len(lists) > 1:
        lists = _of_split(lists, file)
    if lists:
        ((key, rows),) = lists.items()
        yield from ((f"{file.name}:{key}[{index}]", row) for index, row in enumerate(rows))
    elif columns := _columns(value):
        yield from ((f"{file.name}:[{index}]", row) for index, row in enumerate(columns))
    elif value and all(isinstance(each, dict) for each in value.values()):
        yield from ((f"{file.name}:[{key!r}]", {"id": key, **row}) for key, row in value.items())
    elif value:
        raise UserError(
            f"{file.path} holds no rows.",
            f"It is one JSON object with {', '.join(map(repr, list(value)[:12]))}, of which none is a list of rows.",
            "Give a JSON list of rows, or one row per line.",
        )


def _is_row(value: dict[str, Any], columns: Mapping[str, str]) -> bool:
    if columns and any(theirs in value for theirs in columns.values()):
        return True
    if _columns(value):
        return False
    if not any(isinstance(each, (dict, list)) for each in value.values()):
        return bool(value)
    try:
        refuse_preference(value, False)
        find_shape(value, {})
    except InvalidRow as error:
        return str(error).startswith(("two ", "preference"))
    return True


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value[:100])


def _of_split(lists: dict[str, Any], file: JsonObject) -> dict[str, Any]:
    """The list of the wanted split, where the keys are splits."""
    if {key.casefold() for key in lists} <= _SPLITS:
        name = choose_split(str(file.path), lists, file.option, file.split)
        return {name: lists[name]}
    raise UserError(
        f"{file.path} holds several lists.",
        f"It is one JSON object with lists of rows under {', '.join(map(repr, lists))}.",
        "Write the list that is meant into a file of its own.",
    )


def _columns(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an object of columns, as ``DataFrame.to_json`` and ``Dataset.to_dict`` write them; [] if it is none."""
    columns = list(value.values())
    if len(columns) < 2:
        return []
    if all(isinstance(each, dict) and each and all(key.isdecimal() for key in each) for each in columns):
        keys = list(columns[0])
        if all(list(each) == keys for each in columns):
            return [{name: each[key] for name, each in value.items()} for key in keys]
        return []
    if not all(isinstance(each, list) for each in columns) or len({len(each) for each in columns}) != 1:
        return []
    if any(isinstance(each, dict) for column in columns for each in column[:1]):
        return []
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
