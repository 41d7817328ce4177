"""Wrong captions for each picture, so chosen that words alone do not give them away.

Data flow: Scenes with captions -> ``partners`` (who trades with whom) -> ``make_false_captions`` -> ``drawing``, which
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
    is_false_caption,
    match_pairs,
    mutually_false,
    nearest_pairs,
    nouns_to_swap,
    swap_fitness,
    swap_nouns,
)
from lightning_mm.data.probe_sets.build.scenes import Scene

Kind = Literal["given", "traded", "nearest"]


@dataclass(frozen=True)
class FalseCaptions:
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


def make_false_captions(scenes: Sequence[Scene], seed: int) -> dict[str, FalseCaptions]:
    """Wrong captions by the id of the scene; a scene that finds no partner has none.

    Args:
        scenes: Those with a caption.
        seed: Of the pairing.
    """
    order = sorted(scenes, key=lambda scene: scene.id)
    random.Random(f"{seed}:entailment").shuffle(order)
    found: dict[str, FalseCaptions] = {}
    families = _families(order)
    singles = [family[0] for family in families if len(family) == 1]
    waiting: list[list[Scene]] = []
    for family in (family for family in families if len(family) > 1):
        within = _match_within(family)
        if len(within) >= len(family) - 1:
            found.update(_with_common_group(family, within))
        else:
            waiting.append(family)
    for party in _pair_groups(waiting, singles):
        found.update(_with_common_group(party, _match_within(party)))
    return found | _match_within(singles)


def _families(scenes: Sequence[Scene]) -> list[list[Scene]]:
    """What the file holds together; scenes of no group alone."""
    by_family: dict[str, list[Scene]] = {}
    for scene in scenes:
        by_family.setdefault(scene.family, []).append(scene)
    return list(by_family.values())


def _pair_groups(families: Sequence[list[Scene]], singles: list[Scene]) -> list[list[Scene]]:
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


def _with_common_group(scenes: Sequence[Scene], found: Mapping[str, FalseCaptions]) -> dict[str, FalseCaptions]:
    group = _group_name(scenes)
    return {name: replace(wrong, group=group) for name, wrong in found.items()}


def _match_within(scenes: Sequence[Scene]) -> dict[str, FalseCaptions]:
    """Wrong captions from among these scenes."""
    found: dict[str, FalseCaptions] = {}
    given, alone = _split_given([scene for scene in scenes if scene.false_captions])
    for family in given:
        found.update(_given(family))
    pairs, rest = match_pairs([scene for scene in scenes if not scene.false_captions], swap_fitness, enough=2.0)
    for pair in pairs:
        found.update(_traded(pair))
    for block in _pair_blocks(nearest_pairs(rest + alone)):
        found.update(_nearest(block))
    return found


def _split_given(scenes: Sequence[Scene]) -> tuple[list[list[Scene]], list[Scene]]:
    """Scenes whose rows give wrong captions: groups as the rows say, the others in twos."""
    families = _families(scenes)
    pairs, left = match_pairs([family[0] for family in families if len(family) == 1], mutually_false, enough=1.0)
    return [family for family in families if len(family) > 1] + [list(pair) for pair in pairs], left


def _given(family: Sequence[Scene]) -> dict[str, FalseCaptions]:
    group, others = _group_name(family), _rotate_captions([[scene] for scene in family])
    return {scene.id: FalseCaptions(others.get(scene.id), scene.false_captions[0], group, "given") for scene in family}


def _traded(pair: Pair) -> dict[str, FalseCaptions]:
    one, other = pair
    a, b = nouns_to_swap(one, other)
    hard = swap_nouns(one.caption, a, other.caption, b)
    group = _group_name(pair)
    return {
        one.id: FalseCaptions(other.caption, hard[0], group, "traded"),
        other.id: FalseCaptions(one.caption, hard[1], group, "traded"),
    }


def _nearest(block: Sequence[Pair]) -> dict[str, FalseCaptions]:
    """Within a pair captions are near; the next pair of the block gives the random ones."""
    group, others = _group_name([scene for pair in block for scene in pair]), _rotate_captions(block)
    return {
        scene.id: FalseCaptions(others.get(scene.id), near.caption, group, "nearest")
        for pair in block
        for scene, near in zip(pair, reversed(pair), strict=True)
    }


def _rotate_captions(units: Sequence[Sequence[Scene]]) -> dict[str, str]:
    """For each scene the caption of its like in another unit, handed round so that each is used once; nothing at all
    where it cannot be done with captions that are surely wrong: half of a trade would leave a cue."""
    for shift in range(1, len(units)):
        givers = [*units[shift:], *units[:shift]]
        pairs = [pair for unit, giver in zip(units, givers, strict=True) for pair in zip(unit, giver, strict=True)]
        if all(is_false_caption(giver, scene) for scene, giver in pairs):
            return {scene.id: giver.caption for scene, giver in pairs}
    return {}


def _pair_blocks(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Two pairs each, the last of three where their number is odd."""
    blocks = [list(pairs[i : i + 2]) for i in range(0, len(pairs), 2)]
    if len(blocks) > 1 and len(blocks[-1]) == 1:
        odd = blocks.pop()
        blocks[-1] += odd
    return blocks


def _group_name(scenes: Sequence[Scene]) -> str:
    return "+".join(sorted({scene.family for scene in scenes}))
