"""The shape of a row: where in it the conversation is.

Data flow: a row -> ``find_shape`` -> ``Shape``: its name, the columns it reads, and ``read``, which adds the turns to a
``MessageReader``.

A column with a whole conversation comes before columns with a question and an answer, since it says more; these come
before a caption. What a user names (``Source.columns``) comes first of all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_mm.data.readers import questions
from lightning_mm.data.readers.invalid_row import InvalidRow, kind_of
from lightning_mm.data.readers.literals import list_of
from lightning_mm.data.readers.media_columns import image_columns
from lightning_mm.data.readers.messages import MessageReader, pair_keys
from lightning_mm.data.readers.training_marks import read_train_mark

Row = Mapping[str, Any]
_CONVERSATIONS = ("conversations", "messages", "conversation", "dialog", "dialogue", "dialogs", "chat", "turns",
                  "texts", "contents")  # fmt: skip
_SYSTEM = ("system", "system_prompt", "system_message", "systeminstruction", "system_instruction")


@dataclass(frozen=True)
class Shape:
    """Where the conversation of a row is.

    Args:
        name: What people call it.
        kind: "conversation", "columns" or "caption".
        columns: The columns that it reads.
        read: Adds the turns of a row.
        with_ids: Whether the id of a picture stands for it.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    read: Callable[[Row, MessageReader], object]
    with_ids: bool = False


def find_shape(row: Row, named: Mapping[str, str]) -> Shape:
    """The shape of a row.

    Args:
        row: The row, with named columns under our names.
        named: Our name -> the file's, of the columns that the user named.

    Raises:
        InvalidRow: It has none that is known, or two that say different things.
    """
    if set(named) & {"prompt", "query", "question", "response", "answer"} and "messages" not in named:
        return _columns_shape(row, named) or _no_shape(row)
    return _conversation_shape(row, named) or _columns_shape(row, named) or _caption_shape(row) or _no_shape(row)


def _no_shape(row: Row) -> Shape:
    for name in _CONVERSATIONS[:2]:
        if name in row:
            raise InvalidRow(
                f"no conversation: neither 'conversations' nor 'messages' is a list with turns, {name!r} is "
                f"{'an empty list' if row[name] == [] else kind_of(row[name])}"
            )
    if isinstance(row.get("text"), str):
        raise InvalidRow("no conversation: the row is text alone, and nothing says which part of it is the answer")
    raise InvalidRow(
        f"no conversation: no 'conversations' or 'messages' with turns, no question with its answer; the row has "
        f"{', '.join(map(repr, list(row)[:20])) or 'nothing'}"
    )


def _conversation_shape(row: Row, named: Row) -> Shape | None:
    keys = questions.keys_of(row)
    names = ["messages"] if "messages" in named else [keys[name] for name in _CONVERSATIONS if name in keys]
    found = {name: turns for name in names if (turns := _turns(row.get(name)))}
    if len(found) > 1:
        first, second = list(found)[:2]
        raise InvalidRow(
            f"two conversations: both {first!r} and {second!r} are given; name one, as columns messages={first}"
        )
    if not found:
        return None
    ((name, turns),) = found.items()
    first_turn = turns[0] if isinstance(turns[0], dict) else {}
    pair = pair_keys(first_turn)
    if pair:
        described = "/".join(pair)
        kind = "The Cauldron, FineVision" if name == "texts" else "pairs of question and answer"
    else:
        parts = [key for key in ("from", "role", "speaker", "value", "content", "text", "parts") if key in first_turn]
        described = "/".join(parts[:2]) or "/".join(map(str, list(first_turn)[:2]))
        kind = "ShareGPT, LLaVA" if "from" in first_turn else "messages"
    described = f"{kind} ({named.get('messages', name)}: {described})"
    return Shape(described, "conversation", (name,), lambda row, reader: reader.read(_turns(row[name]) or []))


def _turns(value: Any) -> list[Any] | None:
    """The turns in a column, also where a table holds them as JSON text; None if it holds something else."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = list_of(value)
    if isinstance(value, dict) and value and all(isinstance(each, list) for each in value.values()):
        value = _transposed(value)
    return value if isinstance(value, list) and value else None


def _transposed(columns: dict[str, list[Any]]) -> list[dict[str, Any]] | None:
    """A list of objects that an older ``datasets.Sequence`` holds as an object of lists."""
    if len({len(each) for each in columns.values()}) != 1:
        return None
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _columns_shape(row: Row, named: Mapping[str, str]) -> Shape | None:
    """Question and answer in columns of their own; a question without an answer too, which is checked later."""
    asked = questions.question_columns(row, named)
    if not asked:
        return None
    option_columns, options = questions.options_of(row, named)
    answered = questions.answer_columns(row, named, bool(options))
    keys = questions.keys_of(row)
    history = keys.get("history", "")
    columns = (*([history] if history else []), *asked, *option_columns, *answered)
    kind = (
        "multiple choice" if options else
        "alpaca" if "instruction" in keys else
        "prompt and completion" if {"prompt", "completion"} <= set(keys) else
        "question and answer"
    )  # fmt: skip

    def read(row: Row, reader: MessageReader) -> None:
        if history:
            _read_history(row[history], reader)
        _read_question(row, asked, reader, options)
        if answered:
            _read_answer(row, answered, reader, options)

    shown = ", ".join(named.get(column, column) for column in columns)
    return Shape(f"{kind} ({shown})", "columns", columns, read, with_ids=True)


def _read_question(row: Row, asked: list[str], reader: MessageReader, options: Mapping[str, str]) -> None:
    if isinstance(row[asked[0]], list) and len(asked) == 1:  # TRL's conversational prompt
        reader.read(row[asked[0]])
        return
    texts = [row.get(column) for column in asked]
    if wrong := next((text for text in texts if not isinstance(text, str)), None):
        raise InvalidRow(f"wrong type: {asked[0]!r} is {kind_of(wrong)}, not text")
    question = "\n".join(text for text in texts if isinstance(text, str) and text)
    reader.add("user", questions.choice_question(question, options) if options else question)


def _read_answer(row: Row, answered: list[str], reader: MessageReader, options: Mapping[str, str]) -> None:
    if options:
        chosen = {questions.chosen_label(row[column], options, column) for column in answered}
        if len(chosen) > 1:
            raise InvalidRow(f"two answers: {' and '.join(map(repr, answered))} name different options")
        reader.add("assistant", chosen.pop(), question_type=reader.question_type)
        return
    value = row.get(answered[0])
    value = [value] if isinstance(value, dict) and "role" in value else value  # LLaMA-Factory's chosen turn
    if isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "from"} & set(value[0]):
        reader.read(value)
    elif value is not None:
        text = questions.answer_text(value, answered[0])
        reader.add("assistant", text, question_type=reader.question_type)
        reader.found.ignored.update(questions.other_texts(value, text, answered[0]))


def _read_history(history: Any, reader: MessageReader) -> None:
    """Earlier turns: pairs of question and answer, or messages."""
    turns = list_of(history) if isinstance(history, str) else history
    if not isinstance(turns, list):
        raise InvalidRow(f"wrong type: 'history' is {kind_of(history)}, not a list")
    for turn in turns:
        if isinstance(turn, (list, tuple)) and len(turn) == 2:
            reader.add("user", turn[0])
            reader.add("assistant", turn[1], question_type=reader.question_type)
        else:
            reader.read([turn])


def _caption_shape(row: Row) -> Shape | None:
    if not image_columns(row, with_ids=True)[1] or not (found := questions.caption_columns(row)):
        return None
    column = found[0]

    def read(row: Row, reader: MessageReader) -> None:
        reader.add("user", questions.CAPTION_QUESTION)
        value = row[column]
        text = questions.answer_text(value[0] if isinstance(value, list) and value else value, column)
        reader.add("assistant", text, question_type=reader.question_type)
        reader.found.ignored.update(questions.other_texts(value, text, column))

    return Shape(
        f"picture and caption ({column}), asked for with {questions.CAPTION_QUESTION!r}",
        "caption",
        (column,),
        read,
        True,
    )


def system_prompt(row: Row) -> tuple[str, str]:
    """The column with a system prompt and its text; both '' if there is none.

    Raises:
        InvalidRow: It is no text.
    """
    keys = questions.keys_of(row)
    for name in _SYSTEM:
        if name in keys and (value := row[keys[name]]) != "":
            if isinstance(value, dict) and isinstance(value.get("parts"), list):  # Gemini's
                value = "".join(str(part.get("text", "")) for part in value["parts"] if isinstance(part, dict))
            if not isinstance(value, str):
                raise InvalidRow(f"wrong type: {keys[name]!r} is {kind_of(value)}, not text")
            return keys[name], value
    return "", ""


def trains(row: Row) -> bool:
    """Whether the row says that its answers are learned, or says nothing of it.

    Raises:
        InvalidRow: It says something that cannot be obeyed.
    """
    return read_train_mark(row, "row") is not False
