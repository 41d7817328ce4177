"""CIDEr-D against values of pycocoevalcap 1.2, values by hand, and what it must be by its definition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mm.core.cider import cider, words

ANSWERS = ["a red car on a wet road", "two cats sleep on the sofa", "a a a man", "an airport"]
REFERENCES = [
    ["a red car drives on a road", "the red car is on a wet road in the rain"],
    ["two cats sleep on a sofa", "cats on the sofa"],
    ["a man rides a horse"],
    ["a man at an airport", "people wait in a hall", "an airport"],
]
PYCOCOEVALCAP = [3.437222295632597, 4.979956410299303, 0.987687938123058, 2.651507276880891]


def test_is_what_pycocoevalcap_computes() -> None:
    """Its ``CiderScorer`` (n = 4, sigma = 6) on these lower-case texts without punctuation, run once, in float64."""
    assert cider(ANSWERS, REFERENCES) == pytest.approx(PYCOCOEVALCAP, abs=1e-9)


def test_by_hand_two_questions() -> None:
    """Of two questions, words of one alone weigh ln 2, shared ones nothing: each order's cosine is a count."""
    (first, second) = cider(["blue cat", "red dog"], [["blue dog"], ["red dog"]])
    # "blue" weighs ln 2, "cat" ln 2 (in no reference), "dog", in both references, 0: the cosine of words is 1 / sqrt 2,
    # that of bigrams 0; of four orders.
    assert first == pytest.approx(10 * (1 / math.sqrt(2)) / 4)
    # "red" is the only word that weighs, and "red dog" the only bigram: cosines 1 and 1 of four orders.
    assert second == pytest.approx(10 * 2 / 4)


def test_the_penalty_of_length_and_the_clipping_by_hand() -> None:
    (once, _) = cider(["x x x", "q"], [["x"], ["r"]])
    # Words: min(3, 1) * 1 / (3 * 1); two bigrams against none: exp(-4 / 72).
    assert once == pytest.approx(10 * (1 / 3) / 4 * math.exp(-4 / 72))


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=4, max_size=9), min_size=2, max_size=6, unique_by=str))
def test_the_references_themselves_have_ten_where_a_word_of_each_order_is_theirs_alone(texts: list[list[str]]) -> None:
    """Marked with words that no other has, an answer equal to its only reference has 10, and one of no word of it 0."""
    marked = [" ".join(f"{word}{number}" for word in text) for number, text in enumerate(texts)]
    assert cider(marked, [[each] for each in marked]) == pytest.approx([10.0] * len(marked))
    assert cider(["zzz"] * len(marked), [[each] for each in marked]) == [0.0] * len(marked)


def test_order_of_references_and_case_and_punctuation_do_not_count() -> None:
    turned = [texts[::-1] for texts in REFERENCES]
    shouted = [f" {answer.upper()}! " for answer in ANSWERS]
    assert cider(shouted, turned) == pytest.approx(cider(ANSWERS, REFERENCES))
    told = words("Don't stop: the dog's “bone” (100%)")
    assert told == ["do", "n't", "stop", "the", "dog", "'s", "“", "bone", "”", "100", "%"]
