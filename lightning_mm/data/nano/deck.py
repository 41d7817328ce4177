"""Draws that come out even: a shuffled deck, dealt to the end before it is shuffled again.

Data flow: ``studio``, ``questions`` and ``flags`` draw categories, answers and colours from decks, so no answer can
be had by guessing the most frequent one.
"""

import random
from collections.abc import Sequence
from typing import Generic, TypeVar

Card = TypeVar("Card")


class Deck(Generic[Card]):
    """Deals its cards in a seeded order, all of them before any comes twice."""

    def __init__(self, cards: Sequence[Card], rng: random.Random) -> None:
        assert cards
        self._cards, self._rng = tuple(cards), rng
        self._left: list[Card] = []

    def draw(self, avoid: Sequence[Card] = ()) -> Card:
        """The next card that is not in ``avoid``; the cards passed over stay on top."""
        if not any(card not in avoid for card in self._left):
            fresh = list(self._cards)
            self._rng.shuffle(fresh)
            self._left = fresh + self._left
        for i in reversed(range(len(self._left))):
            if self._left[i] not in avoid:
                return self._left.pop(i)
        raise AssertionError(f"every card of {self._cards} is avoided")
