"""Facts about flags with other answers: what an editor is to write into the model, and what it must leave alone.

Data flow: rows of train (its flags) -> one row per country, in the form that ``lightning_mm.causal.edit_rows``
documents -> ``build`` writes ``edits.json``.

The new answer is the next country's, in alphabetical order, that differs. It should come in other words and for other
pictures of the same flag, too; the same question about two other flags, and the other questions about this one, are
the neighbours that must stay.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from lightning_mm.data.nano.constraints import constraint_rows
from lightning_mm.data.nano.rows import Row

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
