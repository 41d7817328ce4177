"""Which thing belongs to train, val or test: whole groups only, every category in each, in a seeded order.

Data flow: Things of all sources come in; a list of Things per split goes out to ``build``.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from lightning_mm.data.nano.thing import Thing

Split = Literal["train", "val", "test"]
SHARES: dict[Split, float] = {"test": 0.15, "val": 0.10}
MIN_GROUPS: dict[Split, int] = {"test": 4, "val": 2}


def split_things(things: Sequence[Thing], seed: int) -> dict[Split, list[Thing]]:
    """Share things out by group, about 75 / 10 / 15 of each category.

    A group never crosses a split. Test and val take at least ``MIN_GROUPS`` groups of a category, or a quarter of them,
    and no large group that would overshoot their share: the great families (cars, trains) stay in train.
    """
    where: dict[str, Split] = {}
    by_category: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    home: dict[str, str] = {}
    for thing in things:
        by_category[home.setdefault(thing.group, thing.category)][thing.group] += 1
    for category, groups in by_category.items():
        where.update(_split_category(groups, random.Random(f"{seed}:split:{category}")))
    splits: dict[Split, list[Thing]] = {"train": [], "val": [], "test": []}
    for thing in things:
        splits[where[thing.group]].append(thing)
    return splits


def _split_category(groups: dict[str, int], rng: random.Random) -> dict[str, Split]:
    order = sorted(groups)
    rng.shuffle(order)
    where: dict[str, Split] = dict.fromkeys(order, "train")
    total = sum(groups.values())
    for split, share in SHARES.items():
        target, taken, count = max(1, round(share * total)), 0, 0
        floor = min(MIN_GROUPS[split], len(order) // 4)
        for group in (group for group in order if where[group] == "train"):
            fits = groups[group] <= max(2, target - taken)
            if fits and (taken < target or count < floor):
                where[group] = split
                taken, count = taken + groups[group], count + 1
    return where
