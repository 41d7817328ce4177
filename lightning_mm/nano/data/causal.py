"""Rows of constraints.json, constraints_flags.json and edits.json: questions with what determines the answer.

Constraint rows are questions of the other files in the format of ``lightning_mm.causal.questions.files``:
constraints.json those of train_flags.json, where the facts are learned, and of val.json; constraints_flags.json those
of test_flags.json, the same facts in a hand that was not shown. The constraint is the part of the question that refers
to a thing in the image, without its article; "this", "the picture" or "this flag" where nothing is named. Questions
answered by no are left out: any other word would be equally false. A group holds all questions about one image, or
about one country.

Edit rows, in the format of ``lightning_mm.causal.editing.files``, give each country the answer of the next country in
alphabetical order that differs. The new answer should hold for paraphrases and other images of the flag, those of the
other hand too; the same question about two other flags, and the other questions about this one, must keep their
answers.

Data flow: rows of train_flags, test_flags and val -> ``constraint_rows``, ``edit_rows`` -> ``build``.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from lightning_mm.data.english import plural
from lightning_mm.data.sample import IMAGE_MARK
from lightning_mm.nano.data.rows import Row

PATTERNS: Mapping[str, str] = {
    "flag_country": r"Which country has (this flag)\?",
    "flag_capital": r"What is the capital of (the country with this flag)\?",
    "flag_continent": r"On which continent is (the country with this flag)\?",
    "caption": r"What is in (the picture)\?",
    "category": r"(?:Is (this) an animal|Are (these) animals), .+\?",
    "presence": r"(?:Is|Are) there (?:an? )?(.+) in the picture\?",
    "yes_no": r"(?:Is|Are) there (?:an? )?(.+) in the picture\?",
    "count": r"How many (.+) are there\?",
    "count_all": r"How many things are in (the picture)\?",
    "left_right": r"(?:Is|Are) the (.+) left or right of the (.+)\?",
    "above_below": r"(?:Is|Are) the (.+) above or below the (.+)\?",
    "colour": r"What colour (?:is|are) the (.+)\?",
    "bind_colour": r"What colour (?:is|are) the (.+)\?",
    "colour_bg": r"What colour is the (background)\?",
    "side_colour": r"What colour is (the thing (?:on|at) the (?:left|right|top|bottom))\?",
    "side_category": r"Is (the thing (?:on|at) the (?:left|right|top|bottom)) an animal, .+\?",
    "compare_count": r"Are there more (.+) or more (.+)\?",
    "compare_size": r"Is (the thing on the left|the thing on the right) larger or smaller than (the thing .+)\?",
    "caption_match": r'Does "(.+)" describe the picture\?',
}
"""Question type -> pattern whose groups are the constraints."""
_OF_ALL = (
    "flag_country", "flag_capital", "flag_continent", "caption", "category", "count_all", "compare_size",
    "caption_match",
)  # fmt: skip
"""Question types whose constraint refers to everything in the image."""


def constraint_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of ``constraints.json`` or ``constraints_flags.json``.

    Args:
        rows: Rows with one question each; a row whose question names no constraint, or is answered by no, gives none.
    """
    return [made for row in rows if (made := _constraint_row(row)) is not None]


def _constraint_row(row: Row) -> Row | None:
    asked, told = row["conversations"]
    question, kind = asked["value"].removeprefix(f"{IMAGE_MARK}\n"), told["type"]
    match = re.fullmatch(PATTERNS[kind], question)
    assert match is not None, f"{kind} is not asked like this: {question}"
    if told["value"] == "No.":
        return None
    constraints = [words for words in match.groups() if words]
    boxes = [each for each in row["boxes"] if kind in _OF_ALL or _names(each["name"]) & set(constraints)]
    return {
        "id": row["id"],
        "image": row["image"],
        "question": question,
        "constraint": constraints if len(constraints) > 1 else constraints[0],
        "boxes": [{"name": each["name"], "box": each["box"]} for each in boxes],
        "answer": told["value"],
        "group": row["boxes"][0]["name"] if row["kind"] == "flag" else row["image"],
        "kind": kind,
    }


def _names(name: str) -> set[str]:
    return {name, plural(name)}


PARAPHRASES = {
    "flag_country": ("To which country does this flag belong?", "This is the flag of which country?"),
    "flag_capital": (
        "Which city is the capital of the country with this flag?",
        "Name the capital of the country with this flag.",
    ),
    "flag_continent": (
        "The country with this flag is on which continent?",
        "Name the continent of the country with this flag.",
    ),
}
"""Question type -> paraphrases."""


def edit_rows(learned: Sequence[Row], other_hand: Sequence[Row]) -> list[Row]:
    """Rows of ``edits.json``.

    Args:
        learned: Rows of ``train_flags.json``.
        other_hand: Rows of ``test_flags.json``.
    """
    countries, others = _by_country(learned), _by_country(other_hand)
    names = sorted(countries)
    made = []
    for number, (name, kind) in enumerate(zip(names, cycle(PARAPHRASES))):
        if kind not in countries[name]:
            continue
        following = names[number + 1 :] + names[:number]
        neighbors = [countries[other][kind][0] for other in following if kind in countries[other]]
        edit = _edit(countries[name], kind, neighbors, others.get(name, {}).get(kind, []))
        made += [edit] if edit else []
    return made


def _by_country(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Country -> question type -> constraint rows."""
    countries: dict[str, dict[str, list[Row]]] = {}
    for row in constraint_rows(rows):
        countries.setdefault(row["group"], {}).setdefault(row["kind"], []).append(row)
    return countries


def _edit(of_country: dict[str, list[Row]], kind: str, others: Sequence[Row], other_hand: Sequence[Row]) -> Row | None:
    first, *again = of_country[kind]
    different = [row for row in others if row["answer"] != first["answer"]]
    if not different:
        return None
    beside = [found[0] for other, found in of_country.items() if other != kind]
    return {
        **{key: first[key] for key in ("image", "question", "constraint", "answer", "group", "kind")},
        "id": f"edit-{first['id']}",
        "new_answer": different[0]["answer"],
        "paraphrases": list(PARAPHRASES[kind]),
        "other_images": [row["image"] for row in [*again, *other_hand]],
        "neighbours": [_question_fields(row) for row in [*beside, *different[1:3]]],
    }


def _question_fields(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in ("image", "question", "answer", "group")}
