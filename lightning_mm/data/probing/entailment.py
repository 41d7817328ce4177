"""Wrong captions for each picture, so chosen that words alone do not give them away.

Data flow: Scenes with captions -> ``wrong_captions`` -> ``drawing``, which writes the rows.
Shapes: N scenes, V different words.

A caption that is only ever wrong, or a noun that is oftener wrong than right, can be told without looking. So pictures
trade: where one has another's caption, or one of its nouns, the other has its own. Over both pictures every text (for
random wrong captions) and every word (for traded nouns) is as often true as false. Pictures that trade form a group
that no split may tear apart: the half in training would teach the opposite of the half in the test.

Hard wrong captions are, in this order: what the row itself gives; one noun traded with a picture that has no such
thing; the caption that shares the most words. Random ones are another picture's caption as it is.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightning_mm.data.probing.scenes import Scene, SceneObject
from lightning_mm.data.probing.wording import Mention, mentions, speaks_of, traded, words

_LOOK_AHEAD = 200
"""How many scenes are looked at for a partner before the best of them is taken: more would take minutes."""

Kind = Literal["given", "traded", "nearest"]


@dataclass(frozen=True)
class Wrong:
    """The wrong captions of one picture.

    Args:
        random: Another picture's caption; None where there is none that is surely wrong.
        hard: A nearly true one.
        group: Of the pictures that trade.
        kind: How ``hard`` was made.
    """

    random: str | None
    hard: str
    group: str
    kind: Kind


Pair = tuple[Scene, Scene]


def wrong_captions(scenes: Sequence[Scene], seed: int) -> dict[str, Wrong]:
    """Wrong captions by the id of the scene; a scene that finds no partner has none.

    Args:
        scenes: Those with a caption.
        seed: Of the pairing.
    """
    order = sorted(scenes, key=lambda scene: scene.id)
    random.Random(f"{seed}:entailment").shuffle(order)
    given, alone = _families([scene for scene in order if scene.false_captions])
    found = {}
    for family in given:
        found.update(_given(family))
    pairs, rest = _matched([scene for scene in order if not scene.false_captions], _trade, enough=2.0)
    for pair in pairs:
        found.update(_traded(pair))
    for block in _blocks(_nearest_pairs(rest + alone)):
        found.update(_nearest(block))
    return found


def _families(scenes: Sequence[Scene]) -> tuple[list[list[Scene]], list[Scene]]:
    """Scenes whose rows give wrong captions: groups as the rows say, the others in twos."""
    by_group: dict[str, list[Scene]] = {}
    for scene in scenes:
        by_group.setdefault(scene.group or f"alone {scene.id}", []).append(scene)
    families = [family for family in by_group.values() if len(family) > 1]
    pairs, left = _matched([family[0] for family in by_group.values() if len(family) == 1], _any_other, enough=1.0)
    return families + [list(pair) for pair in pairs], left


def _given(family: Sequence[Scene]) -> dict[str, Wrong]:
    group, others = _group(family), _others([[scene] for scene in family])
    return {scene.id: Wrong(others.get(scene.id), scene.false_captions[0], group, "given") for scene in family}


def _traded(pair: Pair) -> dict[str, Wrong]:
    one, other = pair
    a, b = _nouns(one, other)
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
        if all(_surely_wrong(giver, scene) for scene, giver in pairs):
            return {scene.id: giver.caption for scene, giver in pairs}
    return {}


def _blocks(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Two pairs each, the last of three where their number is odd."""
    blocks = [list(pairs[i : i + 2]) for i in range(0, len(pairs), 2)]
    if len(blocks) > 1 and len(blocks[-1]) == 1:
        odd = blocks.pop()
        blocks[-1] += odd
    return blocks


def _matched(
    scenes: Sequence[Scene], fitness: Callable[[Scene, Scene], float], *, enough: float
) -> tuple[list[Pair], list[Scene]]:
    """Each scene in turn with the fittest of the next ones, or the first that is fit enough; alone if none is fit."""
    pairs, left, waiting = [], [], list(scenes)
    while waiting:
        scene, best, at = waiting.pop(0), 0.0, -1
        for i, other in enumerate(waiting[:_LOOK_AHEAD]):
            if (fit := fitness(scene, other)) > best:
                best, at = fit, i
            if best >= enough:
                break
        if at < 0:
            left.append(scene)
        else:
            pairs.append((scene, waiting.pop(at)))
    return pairs, left


def _any_other(one: Scene, other: Scene) -> float:
    return float(_surely_wrong(one, other) and _surely_wrong(other, one))


def _trade(one: Scene, other: Scene) -> float:
    """2 where a noun can be traded for one of the same category, 1 where for another, 0 where none can."""
    if one.objects is None or other.objects is None or not _any_other(one, other):
        return 0.0
    nouns = _tradable(one, other)
    return max((1.0 + alike for _, _, alike in nouns), default=0.0)


def _nearest_pairs(scenes: Sequence[Scene]) -> list[Pair]:
    """Each scene in turn with the one left that shares the most of its words (Jaccard); nobody with its equal."""
    vocabulary = {word: i for i, word in enumerate(sorted({word for s in scenes for word in words(s.caption)}))}
    holds_NV = np.zeros((len(scenes), len(vocabulary)), dtype=np.float32)
    for row, scene in zip(holds_NV, scenes, strict=True):
        row[[vocabulary[word] for word in words(scene.caption)]] = 1
    both_NN, size_N = holds_NV @ holds_NV.T, holds_NV.sum(1)
    near_NN = both_NN / np.maximum(1, size_N[:, None] + size_N[None, :] - both_NN)
    pairs, is_left = [], np.ones(len(scenes), dtype=bool)
    for i, scene in enumerate(scenes):
        order = np.argsort(-near_NN[i], kind="stable") if is_left[i] else ()
        is_left[i] = False
        for j in (j for j in order if is_left[j] and _any_other(scene, scenes[j])):
            pairs.append((scene, scenes[j]))
            is_left[j] = False
            break
    return pairs


def _surely_wrong(told: Scene, shown: Scene) -> bool:
    """Whether the caption of one picture says something else than the other's, as far as anybody knows."""
    if Counter(words(told.caption)) == Counter(words(shown.caption)):
        return False
    if told.objects is None or shown.objects is None:
        return True
    there = {each.name for each in shown.objects}
    named = mentions(told.caption, _names(told))
    return any(each.name not in there for each in named) or not named


def _names(scene: Scene) -> frozenset[str]:
    return frozenset(each.name for each in scene.objects or ())


def _tradable(one: Scene, other: Scene) -> list[tuple[Mention, Mention, bool]]:
    """Pairs of nouns that may be traded and fit in each other's place, and whether they are of one category."""
    return [
        (a, b, _category(one, a) == _category(other, b))
        for a in _strangers(one, other)
        for b in _strangers(other, one)
        if (a.is_plural, a.has_article) == (b.is_plural, b.has_article)
    ]


def _nouns(one: Scene, other: Scene) -> tuple[Mention, Mention]:
    a, b, _ = max(_tradable(one, other), key=lambda trade: trade[2])
    return a, b


def _strangers(one: Scene, other: Scene) -> list[Mention]:
    """What the first caption names that the second picture neither holds nor speaks of, nor anything like it."""
    there = {kind for each in other.objects or () for kind in _fine(each)}
    near = {each.name: _fine(each) & there for each in one.objects or ()}
    return [
        mention
        for mention in mentions(one.caption, _names(one))
        if not near[mention.name] and not speaks_of(other.caption, mention.name)
    ]


def _fine(each: SceneObject) -> set[str]:
    return {kind for level, kind in each.kinds.items() if level != "category"}


def _category(scene: Scene, mention: Mention) -> str:
    kinds = next(each.kinds for each in scene.objects or () if each.name == mention.name)
    return kinds.get("category", kinds["name"])


def _group(scenes: Sequence[Scene]) -> str:
    return "+".join(sorted(scene.id for scene in scenes))
