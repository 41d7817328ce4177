"""Rows of constraints.json and edits.json: questions with the constraint that determines the answer, and facts to edit.

Constraint rows are questions of the other files (flags from train, where the facts are learned; things from val and
test) in the format of ``lightning_mm.causal.questions.files``. The constraint is the part of the question that refers
to a thing in the image, without its article; "this", "the picture" or "this flag" where nothing is named. Questions
answered by no are left out: any other word would be equally false. A group holds all questions about one image, or
about one flag.

Edit rows, in the format of ``lightning_mm.causal.editing.files``, give each country the answer of the next country in
alphabetical order that differs. The new answer should hold for paraphrases and other images of the flag; the same
question about two other flags, and the other questions about this one, must keep their answers.

Data flow: rows of train, val and test -> ``constraint_rows``, ``edit_rows`` -> ``build``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
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
    "category": r"Is (this) an animal, .+\?",
    "presence": r"(?:Is|Are) there (?:an? )?(.+) in the picture\?",
    "yes_no": r"(?:Is|Are) there (?:an? )?(.+) in the picture\?",
    "count": r"How many (.+) are there\?",
    "left_right": r"(?:Is|Are) the (.+) left or right of the (.+)\?",
    "colour": r"What colour (?:is|are) the (.+)\?",
    "caption_match": r'Does "(.+)" describe the picture\?',
}
"""Question type -> pattern whose groups are the constraints."""
_OF_ALL = ("flag_country", "flag_capital", "flag_continent", "caption", "category", "caption_match")
"""Question types whose constraint refers to everything in the image."""


def constraint_rows(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Rows of ``constraints.json``.

    Args:
        rows: Rows of the other files, by the name of the file.
    """
    flags = [row for row in rows["train"] if row["kind"] == "flag"]
    things = [row for split in ("val", "test") for row in rows[split] if row["kind"] != "flag"]
    return [made for row in [*flags, *things] for made in _questions(row)]


def _questions(row: Row) -> Iterator[Row]:
    turns = row["conversations"]
    for asked, told in zip(turns[::2], turns[1::2], strict=True):
        question, kind = asked["value"].removeprefix(f"{IMAGE_MARK}\n"), told["type"]
        match = re.fullmatch(PATTERNS[kind], question)
        assert match is not None, f"{kind} is not asked like this: {question}"
        if told["value"] == "No.":
            continue
        constraints = list(match.groups())
        boxes = [each for each in row["boxes"] if kind in _OF_ALL or _names(each["name"]) & set(constraints)]
        yield {
            "id": f"{row['id']}-{kind}",
            "image": row["image"],
            "question": question,
            "constraint": constraints if len(constraints) > 1 else constraints[0],
            "boxes": [{"name": each["name"], "box": each["box"]} for each in boxes],
            "answer": told["value"],
            "group": row["boxes"][0]["name"] if row["kind"] == "flag" else row["id"],
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


def edit_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of ``edits.json``.

    Args:
        rows: Rows of the train split.
    """
    asked = constraint_rows({"train": rows, "val": (), "test": ()})
    countries: dict[str, dict[str, list[Row]]] = {}
    for row in asked:
        countries.setdefault(row["group"], {}).setdefault(row["kind"], []).append(row)
    names = sorted(countries)
    made = []
    for number, (name, kind) in enumerate(zip(names, cycle(PARAPHRASES))):
        others = [
            countries[other][kind][0] for other in names[number + 1 :] + names[:number] if kind in countries[other]
        ]
        if kind in countries[name]:
            made.append(_edit(countries[name], kind, others))
    return [row for row in made if row is not None]


def _edit(of_country: dict[str, list[Row]], kind: str, others: Sequence[Row]) -> Row | None:
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
        "other_images": [row["image"] for row in again],
        "neighbours": [_question_fields(row) for row in [*beside, *different[1:3]]],
    }


def _question_fields(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in ("image", "question", "answer", "group")}
