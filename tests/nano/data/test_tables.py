"""The tables are sound, and what the pictures are made of does what it says: catalog, facts, cycles, colors, plurals.

Data flow: tables and small inputs -> functions of ``lightning_mm.nano.data``.
"""

from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lightning_mm.data.english import plural
from lightning_mm.nano.data.catalog import CATEGORIES, OTHER, entries
from lightning_mm.nano.data.colors import BACKGROUNDS, TINTS, dominant_color, mean_color, tinted
from lightning_mm.nano.data.cycles import ShuffledCycle
from lightning_mm.nano.data.flags import countries
from lightning_mm.nano.data.questions import join_phrases, with_article
from tests.helpers.nano_rows import ENTRIES, PLURALS


def test_the_catalogue_is_sound() -> None:
    groups = defaultdict(set)
    for entry in entries():
        assert entry.category in (*CATEGORIES, OTHER)
        assert 1 <= len(entry.name.split()) <= 3
        groups[entry.name].add((entry.group, entry.number))
    assert all(len(found) == 1 for found in groups.values()), "one name, one group: else it could be both yes and no"
    assert len(entries()) == len({entry.cldr for entry in entries()})
    assert len(PLURALS) == len(ENTRIES)


def test_the_facts_are_sound() -> None:
    """A dozen facts from memory of an atlas, and no code, name or capital twice."""
    facts = {country.name: country for country in countries()}
    assert len(facts) == len({country.code for country in countries()}) == len(countries()) >= 185
    capitals = [country.capital for country in countries() if country.capital]
    assert len(capitals) == len(set(capitals))
    for name, capital, continent in (
        ("Australia", "Canberra", "Oceania"), ("Brazil", "Brasilia", "South America"),
        ("Canada", "Ottawa", "North America"), ("Kenya", "Nairobi", "Africa"), ("Switzerland", "Bern", "Europe"),
        ("Japan", "Tokyo", "Asia"), ("Turkey", "Ankara", None),
        ("Bolivia", None, "South America"), ("Morocco", "Rabat", "Africa"), ("New Zealand", "Wellington", "Oceania"),
    ):  # fmt: skip
        assert (facts[name].capital, facts[name].continent) == (capital, continent)


@pytest.mark.parametrize(
    ("name", "many"),
    [("cat", "cats"), ("mouse", "mice"), ("cup of tea", "cups of tea"), ("fox", "foxes"), ("berry", "berries"),
     ("donkey", "donkeys"), ("tropical fish", "tropical fish"), ("police car", "police cars"), ("top hat", "top hats"),
     ("loaf of bread", "loaves of bread"), ("toothbrush", "toothbrushes"), ("kitchen knife", "kitchen knives"),
     ("person", "people"), ("man", "men"), ("woman", "women"), ("snowman", "snowmen"), ("human", "humans"),
     ("child", "children"), ("foot", "feet"), ("tooth", "teeth"), ("sheep", "sheep"), ("shelf", "shelves"),
     ("y", "ys")],
)  # fmt: skip
def test_plurals(name: str, many: str) -> None:
    assert plural(name) == many


def test_nouns_and_lists() -> None:
    assert [with_article("owl"), with_article("hourglass"), with_article("horse")] == [
        "an owl",
        "an hourglass",
        "a horse",
    ]
    assert [with_article("rice", "mass"), with_article("grapes", "many")] == ["rice", "grapes"]
    assert join_phrases(["a cat", "two dogs", "rice"]) == "a cat, two dogs and rice"


@pytest.mark.parametrize("name", sorted(BACKGROUNDS))
def test_a_plain_patch_has_the_name_of_its_colour(name: str) -> None:
    assert dominant_color(Image.new("RGBA", (20, 20), (*BACKGROUNDS[name], 255))) == name


def test_no_colour_dominates_halves_or_outlines() -> None:
    halves = Image.new("RGBA", (20, 20), (*BACKGROUNDS["red"], 255))
    halves.paste((*BACKGROUNDS["blue"], 255), (0, 0, 20, 10))
    assert dominant_color(halves) is None
    assert dominant_color(Image.new("RGBA", (20, 20), (0, 0, 0, 255))) is None
    framed = Image.new("RGBA", (20, 20), (0, 0, 0, 255))
    framed.paste((*BACKGROUNDS["red"], 255), (5, 5, 15, 15))
    assert dominant_color(framed) == "red"


@given(st.integers(2, 7), st.integers(1, 60), st.randoms(use_true_random=False))
def test_a_deck_comes_out_even(cards: int, draws: int, rng: Any) -> None:
    deck = ShuffledCycle(range(cards), rng)
    counts = Counter(deck.draw() for _ in range(draws))
    assert max(counts.values()) - min(counts[card] for card in range(cards)) <= 1
    assert all(deck.draw(avoid=[0]) != 0 for _ in range(2 * cards))


def _shaded(low: int, high: int) -> Image.Image:
    """A disc whose brightness runs from one side to the other, with a black rim."""
    picture = Image.linear_gradient("L").resize((64, 64)).point(lambda value: low + value * (high - low) // 255)
    cutout = Image.merge("RGBA", (picture, picture, picture, Image.new("L", (64, 64), 255)))
    for box in ((0, 0, 64, 4), (0, 60, 64, 64)):
        cutout.paste((0, 0, 0, 255), box)
    return cutout


@pytest.mark.parametrize("color", sorted(TINTS))
@pytest.mark.parametrize("span", [(0, 255), (10, 60), (200, 250), (90, 90)], ids=str)
def test_a_tinted_thing_has_the_name_of_its_tint(color: str, span: tuple[int, int]) -> None:
    """Bright, dark and flat drawings alike; 0.65 as a sixth of this one is black rim."""
    assert dominant_color(tinted(_shaded(*span), color), share=0.65) == color


def test_the_mean_is_of_what_is_opaque() -> None:
    half = Image.new("RGBA", (10, 10), (200, 100, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 10, 5))
    assert mean_color(half) == (200, 100, 0)
