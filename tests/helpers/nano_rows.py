"""Reads rows of the nano data and works every answer out anew, from boxes, names and the words of the question alone.

Data flow: rows of a built folder -> ``expected_answer`` -> compared with the answer that the row tells.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from lightning_mm.data.english import COUNT_WORDS, plural
from lightning_mm.nano.data.catalog import entries
from lightning_mm.nano.data.flags import countries
from lightning_mm.nano.data.questions import count_phrase, join_phrases, with_article

Row = dict[str, Any]
ENTRIES = {entry.name: entry for entry in entries()}
PLURALS = {plural(name): name for name in ENTRIES}
NOUNS = {with_article(entry.name, entry.number): entry.name for entry in entries()}
COUNTRIES = {country.name: country for country in countries()}
CATEGORIES = {
    "animal": ("Animal.", "Animals."),
    "food": ("Food.", "Food."),
    "vehicle": ("Vehicle.", "Vehicles."),
    "household": ("Household object.", "Household objects."),
}
FREE_TEXT = "an animal, food, a vehicle or a household object"


def read_rows(folder: Path, name: str) -> list[Row]:
    return list(json.loads((folder / f"{name}.json").read_text("utf-8")))


def question_of(row: Row) -> str:
    asked, told = row["conversations"]
    assert (asked["from"], told["from"], told["type"]) == ("human", "gpt", row["question_type"])
    assert asked["value"].startswith("<image>\n")
    return str(asked["value"].removeprefix("<image>\n"))


def answer_of(row: Row) -> str:
    return str(row["conversations"][1]["value"])


def shown(row: Row) -> Counter[str]:
    return Counter(box["name"] for box in row["boxes"])


def caption_of(names: list[str], numbers: Counter[str]) -> str:
    return join_phrases([count_phrase(name, ENTRIES[name].number, numbers[name]) for name in names])


def expected_answer(row: Row) -> str:
    """The answer to the question of a row; the wording of the question is checked on the way."""
    kind, question = row["question_type"], question_of(row)
    return _READERS[kind](row, question)


def _match(pattern: str, question: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, question)
    assert found, question
    return found.groups()


def _the(row: Row, name: str) -> Row:
    (box,) = [box for box in row["boxes"] if box["name"] == name]
    return dict(box)


def _caption(row: Row, question: str) -> str:
    (name,) = shown(row)
    assert question == "What is in the picture?"
    phrase = with_article(name, ENTRIES[name].number)
    return phrase[0].upper() + phrase[1:] + "."


def _category(row: Row, question: str) -> str:
    (category,) = {box["category"] for box in row["boxes"]}
    if len(row["boxes"]) == 1:
        assert question == f"Is this {FREE_TEXT}?"
        return CATEGORIES[category][0]
    assert question == "Are these animals, food, vehicles or household objects?"
    return CATEGORIES[category][1]


def _presence(row: Row, question: str) -> str:
    (phrase,) = _match(r"(?:Is|Are) there (.+) in the picture\?", question)
    assert question.startswith("Are") == (ENTRIES[NOUNS[phrase]].number == "many"), question
    return "Yes." if NOUNS[phrase] in shown(row) else "No."


def _count(row: Row, question: str) -> str:
    (name,) = _match(r"How many (.+) are there\?", question)
    return COUNT_WORDS[shown(row)[PLURALS[name]]].capitalize() + "."


def _count_all(row: Row, question: str) -> str:
    assert question == "How many things are in the picture?"
    return COUNT_WORDS[len(row["boxes"])].capitalize() + "."


def _along(axis: int, said: str, answers: tuple[str, str]) -> Any:
    def read(row: Row, question: str) -> str:
        one, other = _match(rf"(?:Is|Are) the (.+) {said} the (.+)\?", question)
        first, second = _the(row, one)["box"], _the(row, other)["box"]
        apart = first[axis + 2] <= second[axis] or second[axis + 2] <= first[axis]
        assert apart, f"{row['id']}: the two overlap along that axis"
        return answers[0] if first[axis] < second[axis] else answers[1]

    return read


def _color(row: Row, question: str) -> str:
    (name,) = _match(r"What colour (?:is|are) the (.+)\?", question)
    return f"{_the(row, name)['colour']}.".capitalize()


def _background(row: Row, question: str) -> str:
    assert question == "What colour is the background?"
    return f"{row['background']}.".capitalize()


def outermost(row: Row, side: str) -> Row:
    axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[side]
    order = sorted(row["boxes"], key=lambda box: sign * (box["box"][axis] + box["box"][axis + 2]))
    centers = [(box["box"][axis] + box["box"][axis + 2]) / 2 for box in order]
    assert abs(centers[0] - centers[1]) > 0.12 * 196, f"{row['id']}: two things are about as far {side}"
    return dict(order[0])


def _side_category(row: Row, question: str) -> str:
    (side,) = _match(rf"Is the thing (?:on|at) the (left|right|top|bottom) {FREE_TEXT}\?", question)
    return CATEGORIES[outermost(row, side)["category"]][0]


def _side_color(row: Row, question: str) -> str:
    (side,) = _match(r"What colour is the thing (?:on|at) the (left|right|top|bottom)\?", question)
    return f"{outermost(row, side)['colour']}.".capitalize()


def _compare_count(row: Row, question: str) -> str:
    names = _match(r"Are there more (.+) or more (.+)\?", question)
    counts = [shown(row)[PLURALS[name]] for name in names]
    assert min(counts) >= 1
    assert counts[0] != counts[1]
    more = names[counts.index(max(counts))]
    return more[0].upper() + more[1:] + "."


def _compare_size(row: Row, question: str) -> str:
    sides = _match(r"Is the thing on the (.+) larger or smaller than the thing on the (.+)\?", question)
    assert set(sides) == {"left", "right"}
    asked, other = sorted(row["boxes"], key=lambda box: box["box"][0] + box["box"][2], reverse=sides[0] == "right")
    (width, height), (other_width, other_height) = (
        (box["box"][2] - box["box"][0], box["box"][3] - box["box"][1]) for box in (asked, other)
    )
    ratio, area = max(width, height) / max(other_width, other_height), width * height / (other_width * other_height)
    assert (ratio >= 1.3 and area >= 1.69) or (ratio <= 1 / 1.3 and area <= 1 / 1.69), f"{row['id']}: about the same"
    return "Larger." if ratio > 1 else "Smaller."


def _caption_match(row: Row, question: str) -> str:
    (said,) = _match(r'Does "(.+)" describe the picture\?', question)
    numbers = shown(row)
    true = {count_phrase(name, ENTRIES[name].number, number) for name, number in numbers.items()}
    assert set(re.split(r", | and ", row["caption"])) == true
    assert said in (row["caption"], row["caption_swapped"])
    return "Yes." if set(re.split(r", | and ", said)) == true else "No."


def _country(fact: str) -> Any:
    def read(row: Row, question: str) -> str:
        return f"{getattr(COUNTRIES[row['boxes'][0]['name']], fact)}."

    return read


_READERS: dict[str, Any] = {
    "caption": _caption, "category": _category, "presence": _presence, "yes_no": _presence, "count": _count,
    "count_all": _count_all, "left_right": _along(0, "left or right of", ("Left.", "Right.")),
    "above_below": _along(1, "above or below", ("Above.", "Below.")), "colour": _color, "bind_colour": _color,
    "colour_bg": _background, "side_category": _side_category, "side_colour": _side_color,
    "compare_count": _compare_count, "compare_size": _compare_size, "caption_match": _caption_match,
    "flag_country": _country("name"), "flag_capital": _country("capital"), "flag_continent": _country("continent"),
}  # fmt: skip
