"""Wrong captions for each picture, so chosen that words alone do not give them away.

Data flow: Scenes with captions -> ``partners`` (who trades with whom) -> ``wrong_captions`` -> ``drawing``, which
writes the rows.

A caption that is only ever wrong, or a noun that is oftener wrong than right, can be told without looking. So pictures
trade: where one has another's caption, or one of its nouns, the other has its own. Over both pictures every text (for
random wrong captions) and every word (for traded nouns) is as often true as false. Pictures that trade form a group
that no split may tear apart: the half in training would teach the opposite of the half in the test. Groups of the file
trade within, or all with those of one other group: were every frame of a video to trade with another video, all of them
would hang together, and nothing could be split.

Hard wrong captions are, in this order: what the row itself gives; one noun traded with a picture that has no such
thing; the caption that shares the most words. Random ones are another picture's caption as it is.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

from lightning_mm.data.probe_sets.build.false_captions import (
    Pair,
    are_strangers,
    matched,
    nearest_pairs,
    nouns,
    surely_wrong,
    trade,
    traded,
)
from lightning_mm.data.probe_sets.build.scenes import Scene

Kind = Literal["given", "traded", "nearest"]


@dataclass(frozen=True)
class Wrong:
    """The wrong captions of one picture.

    Args:
        random: Another picture's caption; None where there is none that is surely wrong.
        hard: A nearly true one.
        group: Of the pictures that trade, and of those that hang together with them.
        kind: How ``hard`` was made.
    """

    random: str | None
    hard: str
    group: str
    kind: Kind


def wrong_captions(scenes: Sequence[Scene], seed: int) -> dict[str, Wrong]:
    """Wrong captions by the id of the scene; a scene that finds no partner has none.

    Args:
        scenes: Those with a caption.
        seed: Of the pairing.
    """
    order = sorted(scenes, key=lambda scene: scene.id)
    random.Random(f"{seed}:entailment").shuffle(order)
    found: dict[str, Wrong] = {}
    families = _families(order)
    singles = [family[0] for family in families if len(family) == 1]
    waiting: list[list[Scene]] = []
    for family in (family for family in families if len(family) > 1):
        within = _within(family)
        if len(within) >= len(family) - 1:
            found.update(_as_one(family, within))
        else:
            waiting.append(family)
    for party in _parties(waiting, singles):
        found.update(_as_one(party, _within(party)))
    return found | _within(singles)


def _families(scenes: Sequence[Scene]) -> list[list[Scene]]:
    """What the file holds together; scenes of no group alone."""
    by_family: dict[str, list[Scene]] = {}
    for scene in scenes:
        by_family.setdefault(scene.family, []).append(scene)
    return list(by_family.values())


def _parties(families: Sequence[list[Scene]], singles: list[Scene]) -> list[list[Scene]]:
    """Groups of like size in twos; one left over takes as many of the single scenes, out of their list, if any."""
    by_size = sorted(families, key=len, reverse=True)
    parties = [[one, other] for one, other in zip(by_size[::2], by_size[1::2], strict=False)]
    if len(by_size) % 2:
        odd = by_size[-1]
        if singles or not parties:
            parties.append([odd, singles[: len(odd)]])
            del singles[: len(odd)]
        else:
            parties[-1].append(odd)
    return [[scene for dealt in zip_longest(*party) for scene in dealt if scene] for party in parties]


def _as_one(scenes: Sequence[Scene], found: Mapping[str, Wrong]) -> dict[str, Wrong]:
    group = _group(scenes)
    return {name: replace(wrong, group=group) for name, wrong in found.items()}


def _within(scenes: Sequence[Scene]) -> dict[str, Wrong]:
    """Wrong captions from among these scenes."""
    found: dict[str, Wrong] = {}
    given, alone = _givers([scene for scene in scenes if scene.false_captions])
    for family in given:
        found.update(_given(family))
    pairs, rest = matched([scene for scene in scenes if not scene.false_captions], trade, enough=2.0)
    for pair in pairs:
        found.update(_traded(pair))
    for block in _blocks(nearest_pairs(rest + alone)):
        found.update(_nearest(block))
    return found


def _givers(scenes: Sequence[Scene]) -> tuple[list[list[Scene]], list[Scene]]:
    """Scenes whose rows give wrong captions: groups as the rows say, the others in twos."""
    families = _families(scenes)
    pairs, left = matched([family[0] for family in families if len(family) == 1], are_strangers, enough=1.0)
    return [family for family in families if len(family) > 1] + [list(pair) for pair in pairs], left


def _given(family: Sequence[Scene]) -> dict[str, Wrong]:
    group, others = _group(family), _others([[scene] for scene in family])
    return {scene.id: Wrong(others.get(scene.id), scene.false_captions[0], group, "given") for scene in family}


def _traded(pair: Pair) -> dict[str, Wrong]:
    one, other = pair
    a, b = nouns(one, other)
    hard = traded(one.caption, a, other.caption, b)
    group = _group(pair)
    return {
        one.id: Wrong(other.caption, hard[0], group, "traded"),
        other.id: Wrong(one.caption, hard[1], group, "traded"),
    }


def _nearest(block: Sequence[Pair]) -> dict[str, Wrong]:
    """Within a pair captions are near; the next pair of the block gives the random ones."""
    group, others = _group([scene for pair in block for scene in pair]), _others(block)
    return {
        scene.id: Wrong(others.get(scene.id), near.caption, group, "nearest")
        for pair in block
        for scene, near in zip(pair, reversed(pair), strict=True)
    }


def _others(units: Sequence[Sequence[Scene]]) -> dict[str, str]:
    """For each scene the caption of its like in another unit, handed round so that each is used once; nothing at all
    where it cannot be done with captions that are surely wrong: half of a trade would leave a cue."""
    for shift in range(1, len(units)):
        givers = [*units[shift:], *units[:shift]]
        pairs = [pair for unit, giver in zip(units, givers, strict=True) for pair in zip(unit, giver, strict=True)]
        if all(surely_wrong(giver, scene) for scene, giver in pairs):
            return {scene.id: giver.caption for scene, giver in pairs}
    return {}


def _blocks(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Two pairs each, the last of three where their number is odd."""
    blocks = [list(pairs[i : i + 2]) for i in range(0, len(pairs), 2)]
    if len(blocks) > 1 and len(blocks[-1]) == 1:
        odd = blocks.pop()
        blocks[-1] += odd
    return blocks


def _group(scenes: Sequence[Scene]) -> str:
    return "+".join(sorted({scene.family for scene in scenes}))
