"""Questions with the constraint that the answer hangs on, for causal tools: those of the other files, told once more.

Data flow: rows of train (flags: knowledge is traced where it was learned), val and test (things) -> one row per
question in the form that ``lightning_mm.causal.questions.files`` documents -> ``build`` writes ``constraints.json``.

The constraint is what in the question refers to a thing in the picture, without its article; where nothing names one,
"this", "the picture" or "this flag". The boxes are those of the things that it refers to. Left out are questions whose
answer is no: about something that is not there, any other word would be as untrue. One group holds all questions about
one picture, and those about one flag: what a country's capital is, is one fact in all its pictures.

Facts about flags with other answers: what an editor is to write into the model, and what it must leave alone.

Data flow: rows of train (its flags) -> one row per country, in the form that ``lightning_mm.causal.editing.files``
documents -> ``build`` writes ``edits.json``.

The new answer is the next country's, in alphabetical order, that differs. It should come in other words and for other
pictures of the same flag, too; the same question about two other flags, and the other questions about this one, are
the neighbours that must stay.
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
"""By type of question, where the constraints stand in it."""
_OF_ALL = ("flag_country", "flag_capital", "flag_continent", "caption", "category", "caption_match")
"""Types whose constraint refers to everything that is in the picture."""


def constraint_rows(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The rows of ``constraints.json``.

    Args:
        rows: Of the other files, by their names.
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


WORDINGS = {
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
"""By type of question, other words for it."""


def edit_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of ``edits.json``.

    Args:
        rows: Of the train split.
    """
    asked = constraint_rows({"train": rows, "val": (), "test": ()})
    countries: dict[str, dict[str, list[Row]]] = {}
    for row in asked:
        countries.setdefault(row["group"], {}).setdefault(row["kind"], []).append(row)
    names = sorted(countries)
    made = []
    for number, (name, kind) in enumerate(zip(names, cycle(WORDINGS))):
        others = [
            countries[other][kind][0] for other in names[number + 1 :] + names[:number] if kind in countries[other]
        ]
        if kind in countries[name]:
            made.append(_edit(countries[name], kind, others))
    return [row for row in made if row is not None]


def _edit(of_country: dict[str, list[Row]], kind: str, others: Sequence[Row]) -> Row | None:
    first, *again = of_country[kind]
    strangers = [row for row in others if row["answer"] != first["answer"]]
    if not strangers:
        return None
    beside = [found[0] for other, found in of_country.items() if other != kind]
    return {
        **{key: first[key] for key in ("image", "question", "constraint", "answer", "group", "kind")},
        "id": f"edit-{first['id']}",
        "new_answer": strangers[0]["answer"],
        "paraphrases": list(WORDINGS[kind]),
        "other_images": [row["image"] for row in again],
        "neighbours": [_asked(row) for row in [*beside, *strangers[1:3]]],
    }


def _asked(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in ("image", "question", "answer", "group")}
