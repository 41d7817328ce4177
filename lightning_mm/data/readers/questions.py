"""Question and answer from the columns of a row: instructions, visual questions, multiple choice, captions.

Data flow: a row -> ``question_of``, ``answer_of`` and ``options_of`` -> text of the user and of the assistant.

Multiple choice is asked as LLaVA 1.5 does (Liu et al. 2023, arXiv:2310.03744): one option per line, and the answer is
the letter.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightning_mm.data.readers.invalid_row import InvalidRow, kind_of
from lightning_mm.data.readers.literals import list_of, value_of

CAPTION_QUESTION = "Provide a one-sentence caption for the provided image."
"""Asked where a row has a picture and a caption only, in LLaVA 1.5's words."""
CHOICE_QUESTION = "Answer with the option's letter from the given choices directly."
_QUESTIONS = ("question", "query", "prompt", "instruction", "problem", "input", "inputs", "user", "human")
_ANSWERS = (
    "answer", "answers", "response", "output", "outputs", "completion", "multiple_choice_answer", "target", "targets",
    "label", "solution", "assistant", "gpt", "correct_answer", "direct_answers",
)  # fmt: skip
_OPTIONS = ("choices", "options", "multiple_choices", "mc_options")
_CHOSEN = ("answer", "answer_label", "cop",
           "answerkey", "answer_key", "answer_idx", "answer_index", "correct_choice_idx", "correct_answer",
           "correct", "correct_option", "answers", "response", "output", "target", "gold", "label")  # fmt: skip
_OPTION_COLUMN = re.compile(r"(?:(?:option|choice|opt|op)[ _-]?([a-j]|\d)|a(\d))")
"""Columns of one option each: option_a, option1, "Choice A" (PMC-VQA), choice_a (SEED), opa (MedMCQA), a0 (NExT-QA)."""
_CAPTIONS = ("caption", "captions", "text", "txt")
OTHER_TEXTS = "other texts of"
"""Begins what is counted where a column holds several captions or answers, of which one is learned."""
_TEXTS = ("answer", "text", "value", "answers")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def keys_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Column names in lower case -> as they are, of the columns that are not missing."""
    return {key.casefold(): key for key, value in row.items() if value is not None}


def question_columns(row: Mapping[str, Any], named: Mapping[str, str]) -> list[str]:
    """The columns that make up the question, in order.

    Args:
        row: The row, with named columns under our names.
        named: Our name -> the file's, of the columns that the user named.

    Raises:
        InvalidRow: Several columns may be the question.
    """
    if given := [name for name in ("prompt", "query", "question") if name in named]:
        return [name for name in given if row.get(name) not in (None, "")] or given[:1]
    keys = keys_of(row)
    found = [keys[name] for name in _QUESTIONS if name in keys and isinstance(row[keys[name]], (str, list))]
    if "instruction" in keys and set(map(str.casefold, found)) <= {"instruction", "input", "inputs"}:
        return [keys["instruction"], *(key for key in found if key != keys["instruction"] and row[key])]
    full = [key for key in found if row[key] not in ("", [])]
    if len(full) > 1:
        raise InvalidRow(
            f"two questions: {' and '.join(map(repr, full))} may be the question; name one, as columns prompt={full[0]}"
        )
    return full or found[:1]


def answer_columns(row: Mapping[str, Any], named: Mapping[str, str], has_options: bool) -> list[str]:
    """The columns that hold the answer: one, or with options those that agree on it.

    Args:
        row: The row, with named columns under our names.
        named: Our name -> the file's, of the columns that the user named.
        has_options: Whether the row lists options to choose from.

    Raises:
        InvalidRow: Several columns may be the answer.
    """
    if given := [name for name in ("response", "answer") if name in named]:
        return given[:1]
    keys = keys_of(row)
    if has_options:
        found = [keys[name] for name in _CHOSEN if name in keys]
        return [key for key in found if key.casefold() != "label"] or found
    found = [keys[name] for name in _ANSWERS if name in keys]
    if "multiple_choice_answer" in keys:  # VQAv2's, which is the most frequent of its answers
        return [keys["multiple_choice_answer"]]
    full = [key for key in found if row[key] not in ("", [], {})]
    if len(full) > 1:
        raise InvalidRow(
            f"two answers: {' and '.join(map(repr, full))} may be the answer; name one, as columns response={full[0]}"
        )
    return full or found[:1]


def caption_columns(row: Mapping[str, Any]) -> list[str]:
    """The column with the caption of a picture, if there is one.

    Raises:
        InvalidRow: Several may be it.
    """
    keys = keys_of(row)
    found = [keys[name] for name in _CAPTIONS if name in keys and isinstance(row[keys[name]], (str, list))]
    if len(found) > 1:
        raise InvalidRow(
            f"two answers: {' and '.join(map(repr, found))} may be the caption; name one, as columns "
            f"response={found[0]}"
        )
    return found


def answer_text(value: Any, key: str) -> str:
    """The one answer that is learned: the most frequent where people gave several, the first of equals.

    Args:
        value: Text, a number, or a list of these or of ``{"answer": ...}``.
        key: Its column.

    Raises:
        InvalidRow: It is none of these.

    Example:
        >>> answer_text(["a dog", "dog", "dog"], "answers"), answer_text(3, "answer")
        ('dog', '3')
    """
    if isinstance(value, str):
        written = list_of(value) if key.casefold() in ("answers", "direct_answers") else None  # a cell of a CSV
        return answer_text(written, key) if written else value
    if isinstance(value, Mapping):
        given = next((value[name] for name in _TEXTS if value.get(name)), None)
        if given is not None:
            return answer_text(given, key)
    if isinstance(value, list):
        if not value:
            raise InvalidRow(f"no answer: {key!r} is an empty list")
        return Counter(answer_text(each, key) for each in value).most_common(1)[0][0]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:g}" if isinstance(value, float) and value.is_integer() else str(value)
    raise InvalidRow(f"wrong type: {key!r} is {kind_of(value)}, not text")


def other_texts(value: Any, learned: str, key: str) -> Counter[str]:
    """Texts of a column besides the one that is learned, under words that say so; empty if there are none.

    Args:
        value: What the column holds.
        learned: The one that is learned.
        key: Its column.
    """
    if isinstance(value, Mapping):
        value = next((value[name] for name in _TEXTS if value.get(name)), None)
    number = sum(answer_text(each, key) != learned for each in value) if isinstance(value, list) else 0
    return Counter({f"{OTHER_TEXTS} {key!r}": number} if number else {})


def options_of(row: Mapping[str, Any], named: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The columns with the options of a multiple choice question, and label -> option, in order; empty if none.

    Args:
        row: The row.
        named: Our name -> the file's, of the columns that the user named.
    """
    keys = keys_of(row)
    name = "options" if "options" in named else next((keys[name] for name in _OPTIONS if name in keys), "")
    if name:
        value = row[name]
        value = _written_options(value, row, name) if isinstance(value, str) else value
        if isinstance(value, Mapping) and isinstance(value.get("text"), list):  # ARC's {"text": [...], "label": [...]}
            labels = value.get("label") or _LETTERS
            return [name], {str(label): str(text) for label, text in zip(labels, value["text"], strict=False)}
        if isinstance(value, Mapping):
            return [name], {str(label): str(text) for label, text in value.items() if text not in (None, "")}
        if isinstance(value, list) and value and len(value) <= len(_LETTERS):
            return [name], _lettered([_option_text(each) for each in value])
        return [], {}
    columns = {letter: letter for letter in _LETTERS if isinstance(row.get(letter), (str, int, float))}
    for key, column in keys.items():
        if (match := _OPTION_COLUMN.fullmatch(key)) and isinstance(row[column], (str, int, float)):
            columns[(match[1] or match[2]).upper()] = column
    given = {label: str(row[column]) for label, column in sorted(columns.items()) if row[column] != ""}
    while given and next(reversed(given.values())) == "nan":  # what pandas made of an option that is missing
        given.popitem()
    starts = ({"A", "B"}, {"1", "2"}, {"0", "1"})
    if len({label.isdecimal() for label in given}) != 1 or not any(start <= set(given) for start in starts):
        return [], {}
    texts = dict(zip(given, _lettered(list(given.values())).values(), strict=True))
    return list(columns.values()), given if "1" in given else texts


def _written_options(text: str, row: Mapping[str, Any], name: str) -> Any:
    """The options that a text writes: a list, or lines that begin with their letters.

    Raises:
        InvalidRow: It writes neither, and the answer is a letter or a number, which says nothing alone.
    """
    if (value := value_of(text)) is not None:
        return value
    lines = text.strip().splitlines()
    if len(lines) > 1 and list(_lettered(lines).values()) != lines:
        return lines
    keys = keys_of(row)
    answers = [row[keys[key]] for key in _CHOSEN if key in keys]
    if any(re.fullmatch(r"\(?[A-Z\d][.)]?", str(answer).strip()) for answer in answers) and text.strip() not in (
        "", "nan", "None"
    ):  # fmt: skip
        raise InvalidRow(f"options are no list: {name!r} is {text!r:.60}; write it as JSON")
    return None


def _option_text(value: Any) -> str:
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("text", "option", "content", "value") if value.get(key)), None)
    if not isinstance(value, (str, int, float)):
        raise InvalidRow(f"wrong type: an option is {kind_of(value)}, not text")
    return str(value)


def _lettered(options: list[str]) -> dict[str, str]:
    """Letter -> option; letters that the options begin with already are not doubled."""
    pattern = [rf"\s*\(?{letter}\s*[.):]\s*" for letter in _LETTERS]
    starts = [re.match(prefix, option) for prefix, option in zip(pattern, options, strict=False)]
    if all(starts):
        options = [option[start.end() :] for option, start in zip(options, starts, strict=True) if start]
    return dict(zip(_LETTERS, options, strict=False))


def choice_question(question: str, options: Mapping[str, str]) -> str:
    """A multiple choice question with its options, unless it lists them already."""
    listed = all(
        re.search(rf"(?<!\w){re.escape(label)}\W+{re.escape(text)}", question) for label, text in options.items()
    )
    lines = [] if listed else [f"{label}. {text}" for label, text in options.items()]
    by_number = all(label.isdecimal() for label in options)
    return "\n".join([question, *lines, CHOICE_QUESTION.replace("letter", "number") if by_number else CHOICE_QUESTION])


def chosen_label(value: Any, options: Mapping[str, str], key: str) -> str:
    """The label of the right option.

    Args:
        value: A label, the text of an option, or an index from 0.
        options: Label -> text.
        key: The column of the answer.

    Raises:
        InvalidRow: It is none of the options, or may be two of them.

    Example:
        >>> [chosen_label(value, {"A": "cat", "B": "dog"}, "answer") for value in ("B", "dog", 1, "1", "(B)")]
        ['B', 'B', 'B', 'B', 'B']
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    labels = list(options)
    if isinstance(value, float) and value.is_integer():  # pandas' whole numbers beside missing ones
        value = int(value)
    if type(value) is int and str(value) in labels:
        return str(value)
    if type(value) is int:
        if not 0 <= value < len(labels):
            raise InvalidRow(f"answer is no option: {key!r} is {value}, indices of {len(labels)} options begin at 0")
        return labels[value]
    if not isinstance(value, str):
        raise InvalidRow(f"wrong type: {key!r} is {kind_of(value)}, not one option")
    text = value.strip()
    bare = re.sub(r"^\(?(\w+)[.):]?\s*$", r"\1", text)
    found = {
        label
        for label, option in options.items()
        if label in (text, bare, bare.upper())
        or option.strip().casefold() == text.casefold()
        or re.fullmatch(rf"\(?{re.escape(label)}[.):]\s*{re.escape(option.strip())}", text)
    }
    if text.isdecimal() and not set(labels) & {text} and int(text) < len(labels):
        found.add(labels[int(text)])
    if len(found) != 1:
        what = f"may be {' or '.join(sorted(found))}" if found else "is none of them"
        raise InvalidRow(f"answer is no option: {key!r} is {value!r:.60}, which {what} of {dict(options)!r:.200}")
    return found.pop()
