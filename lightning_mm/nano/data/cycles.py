"""Random draws that come out even.

Data flow: items -> ``ShuffledCycle`` -> ``images``, ``questions``, ``probes``.
"""

import random
from collections.abc import Collection, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class ShuffledCycle(Generic[Item]):
    """Draws items in a seeded random order, each once before any is drawn again.

    Args:
        items: The items; one that is given twice is drawn twice as often.
        rng: Random generator of the order.
    """

    def __init__(self, items: Sequence[Item], rng: random.Random) -> None:
        assert items
        self._items, self._rng = tuple(items), rng
        self._left: list[Item] = []

    def draw(self, avoid: Collection[Item] = ()) -> Item:
        """The next item that is not in ``avoid``; skipped items stay next in order."""
        if not any(item not in avoid for item in self._left):
            fresh = list(self._items)
            self._rng.shuffle(fresh)
            self._left = fresh + self._left
        for i in reversed(range(len(self._left))):
            if self._left[i] not in avoid:
                return self._left.pop(i)
        raise AssertionError(f"every item of {self._items} is avoided")
