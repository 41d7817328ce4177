"""Which things each split shows: by hand, and by group of things.

    train         every hand but the one held out, the groups that are shown
    val, probes   the hand held out, a third of the groups that train shows
    test          the hand held out, the other two thirds
    test_unseen   the hands of train, groups that no other split shows

So val, probes and test ask for known names in drawings of a hand that training never showed, and share no drawing with
each other. Without a second hand they are drawn in the only one there is.

Data flow: ``hands``, ``tuxpaint`` -> ``load_sources`` -> ``split_things`` -> ``SplitThings`` -> ``build``.
"""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lightning_mm.core.decisions import log_decision
from lightning_mm.data.sample import Rejection
from lightning_mm.nano.data import hands
from lightning_mm.nano.data.catalog import Thing, entries
from lightning_mm.nano.data.flags import Country, countries
from lightning_mm.nano.data.tuxpaint import load_stamps

HELD_OUT = ("noto", "twemoji", "fluent", "emojione", "fxemoji")
"""Hands that may be held out, the first one that is there."""
UNSEEN_SHARE, VAL_SHARE = 0.15, 1 / 3
MIN_GROUPS = 4
"""Groups of a category that are never shown, at least, or a quarter of them."""


@dataclass(frozen=True)
class Sources:
    """What the packages on this machine hold.

    Args:
        things: Things by hand.
        flags: Flags and their facts by hand.
        rejected: What each hand lacks.
        absent: Hands whose packages have not been fetched.
    """

    things: Mapping[str, Sequence[Thing]]
    flags: Mapping[str, Sequence[tuple[Thing, Country]]]
    rejected: Sequence[Rejection]
    absent: Sequence[str]


@dataclass(frozen=True)
class SplitThings:
    """The things of each split.

    Args:
        train: Things to train on.
        val: Things of ``val.json`` and ``probes.json``.
        test: Things of ``test.json``.
        test_unseen: Things of ``test_unseen.json``.
        held_out: Hand of val and test.
    """

    train: Sequence[Thing]
    val: Sequence[Thing]
    test: Sequence[Thing]
    test_unseen: Sequence[Thing]
    held_out: str


@cache
def load_sources(stamps: Path | None = None) -> Sources:
    """Every hand that is there; loaded once per process.

    Args:
        stamps: Folder of Tux Paint stamps; None leaves them out.

    Raises:
        UserError: A package is damaged, or the folder holds no stamps.
    """
    things: dict[str, list[Thing]] = {}
    flags: dict[str, list[tuple[Thing, Country]]] = {}
    rejected: list[Rejection] = []
    absent: list[str] = []
    for name in dict.fromkeys((*hands.THING_HANDS, *hands.FLAG_HANDS)):
        hand = hands.open_hand(name)
        if hand is None:
            absent.append(name)
            continue
        if name in hands.THING_HANDS:
            things[name], lacking = hands.load_things(name, hand, entries())
            rejected += lacking
        if name in hands.FLAG_HANDS:
            flags[name], lacking = hands.load_flags(name, hand, countries())
            rejected += lacking
    if stamps is not None:
        things["stamps"], lacking = load_stamps(stamps, hands.RASTER_SIZE)
        rejected += lacking
    return Sources(things, flags, rejected, absent)


def split_things(things: Mapping[str, Sequence[Thing]], seed: int) -> SplitThings:
    """Divide things into splits.

    Args:
        things: Things by hand; OpenMoji is never held out.
        seed: Random seed of the split.
    """
    held_out = next((hand for hand in HELD_OUT if hand in things), "openmoji")
    kept_out: tuple[str, ...] = hands.SAME_DRAWINGS if held_out in hands.SAME_DRAWINGS else (held_out,)
    if held_out == "openmoji":
        kept_out = ()
    shown = [thing for hand, drawn in things.items() if hand not in kept_out for thing in drawn]
    unseen = _groups_apart(shown, UNSEEN_SHARE, MIN_GROUPS, f"{seed}:unseen")
    train = [thing for thing in shown if thing.group not in unseen]
    names = {thing.name for thing in train}
    known = [thing for thing in things[held_out] if thing.name in names and thing.group not in unseen]
    val_groups = _groups_apart(known, VAL_SHARE, MIN_GROUPS, f"{seed}:val")
    return SplitThings(
        train=train,
        val=[thing for thing in known if thing.group in val_groups],
        test=[thing for thing in known if thing.group not in val_groups],
        test_unseen=[thing for thing in shown if thing.group in unseen],
        held_out=held_out,
    )


def _groups_apart(things: Sequence[Thing], share: float, least: int, seed: str) -> set[str]:
    """Groups that hold about a share of the things of each category; none that would exceed it by much.

    Args:
        things: Things to divide.
        share: Share of the things, 0 to 1.
        least: Groups of a category at least, or a quarter of them.
        seed: Random seed.
    """
    home: dict[str, str] = {}
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for thing in things:
        sizes[home.setdefault(thing.group, thing.category)][thing.group] += 1
    apart: set[str] = set()
    for category, groups in sorted(sizes.items()):
        order = sorted(groups)
        random.Random(f"{seed}:{category}").shuffle(order)
        total = sum(groups.values())
        target, taken, count = share * total, 0, 0
        mean = total / len(groups)
        for group in order:
            fits = groups[group] <= max(2 * mean, target - taken)
            if fits and (taken < target or count < min(least, len(order) // 4)):
                apart.add(group)
                taken, count = taken + groups[group], count + 1
    return apart


def log_sources(sources: Sources, split: SplitThings) -> None:
    """Say which hands are used, which are missing, and which is held out."""
    used = ", ".join(sources.things)
    if sources.absent:
        log_decision("nano_data.hands", used, hands.missing_hands(sources.absent))
    else:
        log_decision("nano_data.hands", used, "every package is there")
    if split.held_out == "openmoji":
        reason = "the only hand: val and test show other pictures of the same drawings"
    else:
        reason = "val, test and probes are drawn in it, and training never shows it"
    log_decision("nano_data.held_out", split.held_out, reason)
    if len(sources.flags) == 1:
        log_decision("nano_data.flags", "openmoji", "the only hand: the test of flags shows other pictures of them")
    if sources.rejected:
        reasons = "; ".join(sorted({each.reason for each in sources.rejected}))
        log_decision("nano_data.left_out", len(sources.rejected), reasons)
