"""Which pictures may trade captions, or a noun of them: what each gets must be false of it, as far as anybody knows.

Data flow: Scenes with captions -> ``match_pairs``, ``nearest_pairs`` -> ``entailment``.
Shapes: N scenes, V different words.

Nouns of captions: where a thing is named, and two captions with one noun traded.

Data flow: captions and the names of what is in the pictures -> ``find_mentions``, ``swap_nouns`` -> ``entailment``.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lightning_mm.data.english import plural
from lightning_mm.data.probe_sets.build.scenes import Scene, SceneObject

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_ARTICLE = re.compile(r"\b(a|an)(\s+)$", re.IGNORECASE)
_STOP_WORDS = frozenset(
    ("a", "an", "the", "and", "or", "of", "in", "on", "at", "to", "by", "with", "for", "from", "into", "as", "is",
     "are", "was", "were", "be", "been", "being", "there", "this", "that", "these", "those", "it", "its", "his", "her",
     "their", "some")
)  # fmt: skip
"""Words that two captions share whatever they say."""


@dataclass(frozen=True)
class NounMention:
    """A thing named in a caption.

    Args:
        name: Of the thing, in the singular.
        is_plural: Whether the caption speaks of several, as "sheep" without an article is taken to.
        article: "a" or "an" where it stands before it, in lower case; else nothing.
        start: First character.
        end: One past the last.
    """

    name: str
    is_plural: bool
    article: str
    start: int
    end: int


@lru_cache(maxsize=8192)
def words(caption: str) -> tuple[str, ...]:
    """Its words in lower case.

    Example:
        >>> words("A dog's ball, on-line.")
        ('a', "dog's", 'ball', 'on-line')
    """
    return tuple(word.casefold() for word in _WORD.findall(caption))


@lru_cache(maxsize=8192)
def content_words(caption: str) -> frozenset[str]:
    """Its words without those that say little; all of them where none else is left.

    Example:
        >>> sorted(content("A cat on the mat")), sorted(content("This is it"))
        (['cat', 'mat'], ['is', 'it', 'this'])
    """
    said = frozenset(words(caption))
    return said - _STOP_WORDS or said


def jaccard(one: str, other: str) -> float:
    """What share of all their content words two captions have in common (Jaccard), 0 to 1.

    Example:
        >>> likeness("A cat on a mat", "the cat is on the mat"), likeness("a red cat", "a blue cat")
        (1.0, 0.3333333333333333)
    """
    a, b = content_words(one), content_words(other)
    return len(a & b) / max(1, len(a | b))


@lru_cache(maxsize=8192)
def _pattern(name: str) -> re.Pattern[str]:
    many = plural(name.casefold())
    either = f"{re.escape(name)}|(?P<many>{re.escape(many)})" if many != name.casefold() else re.escape(name)
    return re.compile(rf"(?<![\w-])(?:{either})(?![\w-])", re.IGNORECASE)


@lru_cache(maxsize=8192)
def find_mentions(caption: str, names: frozenset[str]) -> tuple[NounMention, ...]:
    """The things of these names that a caption names once; of two that overlap ("dog", "hot dog") the longer one."""
    found: list[NounMention] = []
    for name in sorted(names, key=lambda name: (-len(name), name)):
        hits = [hit for hit in _pattern(name).finditer(caption) if not any(_overlap(hit.span(), m) for m in found)]
        if len(hits) == 1:
            article = _ARTICLE.search(caption[: hits[0].start()])
            is_plural = hits[0].groupdict().get("many") is not None or (not article and plural(name) == name)
            found.append(NounMention(name, is_plural, article[1].lower() if article else "", *hits[0].span()))
    return tuple(found)


def mentions_name(caption: str, name: str) -> bool:
    """Whether a caption names a thing, once or several times."""
    return bool(_pattern(name).search(caption))


def _overlap(span: tuple[int, int], mention: NounMention) -> bool:
    return span[0] < mention.end and mention.start < span[1]


def swap_nouns(one: str, a: NounMention, other: str, b: NounMention) -> tuple[str, str]:
    """Both captions, each with the other's noun in the place of its own.

    What a noun brings along is its article as its own caption has it ("a unicorn", "an owl"); what stays with the place
    is its capital. So nothing is to be seen in false captions alone.

    Example:
        >>> one, other = "An owl on a branch", "two men and a dog"
        >>> traded(one, *mentions(one, frozenset(["owl"])), other, *mentions(other, frozenset(["dog"])))
        ('A dog on a branch', 'two men and an owl')
    """
    return _replace_noun(one, a, _lowercase_noun(other, b), b.article), _replace_noun(
        other, b, _lowercase_noun(one, a), a.article
    )


def _has_capital(caption: str, mention: NounMention) -> bool:
    """Whether the noun has a capital for where it stands (a sentence, a title) and not for what it is (a TV)."""
    noun = caption[mention.start : mention.end]
    return noun[0].isupper() and noun[1:] == noun[1:].lower() and (mention.start == 0 or mention.name[0].islower())


def _lowercase_noun(caption: str, mention: NounMention) -> str:
    noun = caption[mention.start : mention.end]
    return noun[0].lower() + noun[1:] if _has_capital(caption, mention) else noun


def _replace_noun(caption: str, mention: NounMention, noun: str, article: str) -> str:
    before, after = caption[: mention.start], caption[mention.end :]
    if own := _ARTICLE.search(before):
        before = before[: own.start()] + own[1][0] + article[1:] + own[2]
    begins_so = not before and caption[0].isupper()
    return before + (noun[0].upper() + noun[1:] if begins_so or _has_capital(caption, mention) else noun) + after


_MAX_CANDIDATES = 200
"""How many scenes are looked at for a partner before the best of them is taken: more would take minutes."""
_MAX_SIMILARITY = 0.7
"""Captions that share so much of their content say the same, as far as anybody knows who does not know the things."""

Pair = tuple[Scene, Scene]


def match_pairs(
    scenes: Sequence[Scene], fitness: Callable[[Scene, Scene], float], *, enough: float
) -> tuple[list[Pair], list[Scene]]:
    """Each scene in turn with the fittest of the next ones, or the first that is fit enough; alone if none is fit."""
    pairs, left, waiting = [], [], list(scenes)
    while waiting:
        scene, best, at = waiting.pop(0), 0.0, -1
        for i, other in enumerate(waiting[:_MAX_CANDIDATES]):
            if (fit := fitness(scene, other)) > best:
                best, at = fit, i
            if best >= enough:
                break
        if at < 0:
            left.append(scene)
        else:
            pairs.append((scene, waiting.pop(at)))
    return pairs, left


def mutually_false(one: Scene, other: Scene) -> float:
    """1 where each one's caption is surely wrong about the other, else 0."""
    return float(is_false_caption(one, other) and is_false_caption(other, one))


def swap_fitness(one: Scene, other: Scene) -> float:
    """2 where a noun can be traded for one of the same category, 1 where for another, 0 where none can."""
    if one.objects is None or other.objects is None or not mutually_false(one, other):
        return 0.0
    return max((1.0 + alike for _, _, alike in _swappable(one, other)), default=0.0)


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
        for j in (j for j in order if is_left[j] and mutually_false(scene, scenes[j])):
            pairs.append((scene, scenes[j]))
            is_left[j] = False
            break
    return pairs


def is_false_caption(told: Scene, shown: Scene) -> bool:
    """Whether the caption of one picture says something else than the other's."""
    named = find_mentions(told.caption, _object_names(told))
    if not named or shown.objects is None:
        return all(jaccard(told.caption, caption) <= _MAX_SIMILARITY for caption in shown.captions)
    there = _object_names(shown)
    return any(each.name not in there and not _any_caption_mentions(shown, each.name) for each in named)


def _any_caption_mentions(scene: Scene, name: str) -> bool:
    """Whether any of the captions does, also those that are not used."""
    return any(mentions_name(caption, name) for caption in scene.captions)


def _object_names(scene: Scene) -> frozenset[str]:
    return frozenset(each.name for each in scene.objects or ())


def _swappable(one: Scene, other: Scene) -> list[tuple[NounMention, NounMention, bool]]:
    """Pairs of nouns that may be traded and fit in each other's place, and whether they are of one category."""
    return [
        (a, b, _category(one, a) == _category(other, b))
        for a in _absent_mentions(one, other)
        for b in _absent_mentions(other, one)
        if (a.is_plural, bool(a.article)) == (b.is_plural, bool(b.article))
    ]


def nouns_to_swap(one: Scene, other: Scene) -> tuple[NounMention, NounMention]:
    """The nouns that two scenes trade; ``swap_fitness`` says whether there are any."""
    a, b, _ = max(_swappable(one, other), key=lambda trade: trade[2])
    return a, b


def _absent_mentions(one: Scene, other: Scene) -> list[NounMention]:
    """What the first caption names that the second picture neither holds nor speaks of, nor anything like it."""
    there = {kind for each in other.objects or () for kind in _fine_kinds(each)}
    near = {each.name: _fine_kinds(each) & there for each in one.objects or ()}
    return [
        mention
        for mention in find_mentions(one.caption, _object_names(one))
        if not near[mention.name] and not _any_caption_mentions(other, mention.name)
    ]


def _fine_kinds(each: SceneObject) -> set[str]:
    return {kind for level, kind in each.kinds.items() if level != "category"}


def _category(scene: Scene, mention: NounMention) -> str:
    kinds = next(each.kinds for each in scene.objects or () if each.name == mention.name)
    return kinds.get("category", kinds["name"])
