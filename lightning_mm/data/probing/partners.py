"""Which pictures may trade captions, or a noun of them: what each gets must be false of it, as far as anybody knows.

Data flow: Scenes with captions -> ``matched``, ``nearest_pairs`` -> ``entailment``.
Shapes: N scenes, V different words.
"""

from collections.abc import Callable, Sequence

import numpy as np

from lightning_mm.data.probing.scenes import Scene, SceneObject
from lightning_mm.data.probing.wording import Mention, likeness, mentions, speaks_of, words

_LOOK_AHEAD = 200
"""How many scenes are looked at for a partner before the best of them is taken: more would take minutes."""
_TOO_ALIKE = 0.7
"""Captions that share so much of their content say the same, as far as anybody knows who does not know the things."""

Pair = tuple[Scene, Scene]


def matched(
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


def are_strangers(one: Scene, other: Scene) -> float:
    """1 where each one's caption is surely wrong about the other, else 0."""
    return float(surely_wrong(one, other) and surely_wrong(other, one))


def trade(one: Scene, other: Scene) -> float:
    """2 where a noun can be traded for one of the same category, 1 where for another, 0 where none can."""
    if one.objects is None or other.objects is None or not are_strangers(one, other):
        return 0.0
    return max((1.0 + alike for _, _, alike in _tradable(one, other)), default=0.0)


def nearest_pairs(scenes: Sequence[Scene]) -> list[Pair]:
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
        for j in (j for j in order if is_left[j] and are_strangers(scene, scenes[j])):
            pairs.append((scene, scenes[j]))
            is_left[j] = False
            break
    return pairs


def surely_wrong(told: Scene, shown: Scene) -> bool:
    """Whether the caption of one picture says something else than the other's."""
    named = mentions(told.caption, _names(told))
    if not named or shown.objects is None:
        return all(likeness(told.caption, caption) <= _TOO_ALIKE for caption in shown.captions)
    there = _names(shown)
    return any(each.name not in there and not _speaks_of(shown, each.name) for each in named)


def _speaks_of(scene: Scene, name: str) -> bool:
    """Whether any of the captions does, also those that are not used."""
    return any(speaks_of(caption, name) for caption in scene.captions)


def _names(scene: Scene) -> frozenset[str]:
    return frozenset(each.name for each in scene.objects or ())


def _tradable(one: Scene, other: Scene) -> list[tuple[Mention, Mention, bool]]:
    """Pairs of nouns that may be traded and fit in each other's place, and whether they are of one category."""
    return [
        (a, b, _category(one, a) == _category(other, b))
        for a in _strangers(one, other)
        for b in _strangers(other, one)
        if (a.is_plural, bool(a.article)) == (b.is_plural, bool(b.article))
    ]


def nouns(one: Scene, other: Scene) -> tuple[Mention, Mention]:
    """The nouns that two scenes trade; ``trade`` says whether there are any."""
    a, b, _ = max(_tradable(one, other), key=lambda trade: trade[2])
    return a, b


def _strangers(one: Scene, other: Scene) -> list[Mention]:
    """What the first caption names that the second picture neither holds nor speaks of, nor anything like it."""
    there = {kind for each in other.objects or () for kind in _fine(each)}
    near = {each.name: _fine(each) & there for each in one.objects or ()}
    return [
        mention
        for mention in mentions(one.caption, _names(one))
        if not near[mention.name] and not _speaks_of(other, mention.name)
    ]


def _fine(each: SceneObject) -> set[str]:
    return {kind for level, kind in each.kinds.items() if level != "category"}


def _category(scene: Scene, mention: Mention) -> str:
    kinds = next(each.kinds for each in scene.objects or () if each.name == mention.name)
    return kinds.get("category", kinds["name"])
