"""Questions with the constraint that the answer hangs on, for causal tools: those of the other files, told once more.

Data flow: rows of train (flags: knowledge is traced where it was learned), val and test (things) -> one row per
question in the form that ``lightning_mm.causal.constraints`` documents -> ``build`` writes ``constraints.json``.

The constraint is what in the question refers to a thing in the picture, without its article; where nothing names one,
"this", "the picture" or "this flag". The boxes are those of the things that it refers to. Left out are questions whose
answer is no: about something that is not there, any other word would be as untrue. One group holds all questions about
one picture, and those about one flag: what a country's capital is, is one fact in all its pictures.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from lightning_mm.data.nano.rows import Row
from lightning_mm.data.nano.wording import plural
from lightning_mm.data.sample import IMAGE_MARK

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
