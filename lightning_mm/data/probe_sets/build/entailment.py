"""False captions for each image, balanced so that words alone do not predict the label.

A caption that is only ever false, or a noun that is false more often than true, could be detected without the image.
So images exchange captions: where one gets another's caption, or one of its nouns, the other gets its own. Over both
images every text (random false captions) and every word (swapped nouns) is true as often as false. Images that exchange
captions form a group that no split may divide: the half in training would teach the opposite of the half in the test.
Groups given by the file exchange within, or all with those of one other group: if frames of one video exchanged with
many videos, everything would be one group.

Hard false captions are, in this order: given by the row; one noun swapped with an image that has no such object; the
caption with the most words in common. Random ones are another image's caption.

Data flow: Scenes with captions -> ``false_captions`` (pairs, swaps) -> ``make_false_captions`` -> ``sampling``.
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
    """The false captions of one image.

    Args:
        random: Another image's caption; None where none is certainly false.
        hard: A nearly true caption.
        group: Name of the group of images that exchange captions.
        kind: How ``hard`` was made: ``given``, ``traded`` (noun swapped) or ``nearest``.
    """

    random: str | None
    hard: str
    group: str
    kind: Kind


def make_false_captions(scenes: Sequence[Scene], seed: int) -> dict[str, FalseCaptions]:
    """Id of a scene -> its false captions; a scene without a partner is left out.

    Args:
        scenes: Scenes with a caption.
        seed: Random seed of the pairing.
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
    """Scenes by the groups of the file; scenes without a group alone."""
    by_family: dict[str, list[Scene]] = {}
    for scene in scenes:
        by_family.setdefault(scene.family, []).append(scene)
    return list(by_family.values())


def _pair_groups(families: Sequence[list[Scene]], singles: list[Scene]) -> list[list[Scene]]:
    """Groups of similar size in pairs; one left over takes as many single scenes, out of their list, if any."""
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
    return {name: replace(captions, group=group) for name, captions in found.items()}


def _match_within(scenes: Sequence[Scene]) -> dict[str, FalseCaptions]:
    """False captions from among these scenes."""
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
    """Scenes whose rows give false captions, by group or in pairs, and those without a partner."""
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
    """False captions of a block of pairs: hard ones within a pair, random ones from the next pair."""
    group, others = _group_name([scene for pair in block for scene in pair]), _rotate_captions(block)
    return {
        scene.id: FalseCaptions(others.get(scene.id), near.caption, group, "nearest")
        for pair in block
        for scene, near in zip(pair, reversed(pair), strict=True)
    }


def _rotate_captions(units: Sequence[Sequence[Scene]]) -> dict[str, str]:
    """Scene id -> caption of the corresponding scene of another unit, each caption used once.

    Empty where that is not possible with captions that are certainly false: an incomplete exchange would be a cue.
    """
    for shift in range(1, len(units)):
        givers = [*units[shift:], *units[:shift]]
        pairs = [pair for unit, giver in zip(units, givers, strict=True) for pair in zip(unit, giver, strict=True)]
        if all(is_false_caption(giver, scene) for scene, giver in pairs):
            return {scene.id: giver.caption for scene, giver in pairs}
    return {}


def _pair_blocks(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Blocks of two pairs, the last of three where their number is odd."""
    blocks = [list(pairs[i : i + 2]) for i in range(0, len(pairs), 2)]
    if len(blocks) > 1 and len(blocks[-1]) == 1:
        odd = blocks.pop()
        blocks[-1] += odd
    return blocks


def _group_name(scenes: Sequence[Scene]) -> str:
    return "+".join(sorted({scene.family for scene in scenes}))
