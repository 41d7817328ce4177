"""Pairs of images that may exchange captions or nouns, and the exchange itself.

What an image gets must be false of it, as far as its annotations and captions tell. Nouns are found in captions by the
names of annotated objects.

Data flow: Scenes with captions -> ``match_pairs``, ``nearest_pairs`` -> pairs; ``find_mentions`` -> ``swap_nouns`` ->
captions with one noun exchanged -> ``entailment``.

Shapes: N scenes, V different words.
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
"""Words that are ignored when captions are compared."""


@dataclass(frozen=True)
class NounMention:
    """An object named in a caption.

    Args:
        name: Name of the object, singular.
        is_plural: Whether the caption uses the plural ("sheep" without an article counts as one).
        article: "a" or "an" if it precedes the noun, in lower case; else empty.
        start: First character.
        end: One past the last character.
    """

    name: str
    is_plural: bool
    article: str
    start: int
    end: int


@lru_cache(maxsize=8192)
def words(caption: str) -> tuple[str, ...]:
    """Words of a caption in lower case.

    Example:
        >>> words("A dog's ball, on-line.")
        ('a', "dog's", 'ball', 'on-line')
    """
    return tuple(word.casefold() for word in _WORD.findall(caption))


@lru_cache(maxsize=8192)
def content_words(caption: str) -> frozenset[str]:
    """Words of a caption without stop words; all of them where it has no others.

    Example:
        >>> sorted(content("A cat on the mat")), sorted(content("This is it"))
        (['cat', 'mat'], ['is', 'it', 'this'])
    """
    found = frozenset(words(caption))
    return found - _STOP_WORDS or found


def jaccard(one: str, other: str) -> float:
    """Jaccard similarity of the content words of two captions, 0 to 1.

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
    """Objects of these names that a caption names once; of overlapping ones ("dog", "hot dog") the longer."""
    found: list[NounMention] = []
    for name in sorted(names, key=lambda name: (-len(name), name)):
        hits = [hit for hit in _pattern(name).finditer(caption) if not any(_overlap(hit.span(), m) for m in found)]
        if len(hits) == 1:
            article = _ARTICLE.search(caption[: hits[0].start()])
            is_plural = hits[0].groupdict().get("many") is not None or (not article and plural(name) == name)
            found.append(NounMention(name, is_plural, article[1].lower() if article else "", *hits[0].span()))
    return tuple(found)


def mentions_name(caption: str, name: str) -> bool:
    """Whether a caption names an object, once or more."""
    return bool(_pattern(name).search(caption))


def _overlap(span: tuple[int, int], mention: NounMention) -> bool:
    return span[0] < mention.end and mention.start < span[1]


def swap_nouns(one: str, a: NounMention, other: str, b: NounMention) -> tuple[str, str]:
    """Both captions, each with the other's noun in place of its own.

    A noun takes its article along ("a unicorn", "an owl"); the capital letter belongs to the position. So false
    captions have no grammatical cue.

    Example:
        >>> one, other = "An owl on a branch", "two men and a dog"
        >>> traded(one, *mentions(one, frozenset(["owl"])), other, *mentions(other, frozenset(["dog"])))
        ('A dog on a branch', 'two men and an owl')
    """
    return _replace_noun(one, a, _lowercase_noun(other, b), b.article), _replace_noun(
        other, b, _lowercase_noun(one, a), a.article
    )


def _has_capital(caption: str, mention: NounMention) -> bool:
    """Whether the noun is capitalized for its position (a sentence, a title) and not by itself (a TV)."""
    noun = caption[mention.start : mention.end]
    return noun[0].isupper() and noun[1:] == noun[1:].lower() and (mention.start == 0 or mention.name[0].islower())


def _lowercase_noun(caption: str, mention: NounMention) -> str:
    noun = caption[mention.start : mention.end]
    return noun[0].lower() + noun[1:] if _has_capital(caption, mention) else noun


def _replace_noun(caption: str, mention: NounMention, noun: str, article: str) -> str:
    before, after = caption[: mention.start], caption[mention.end :]
    if own := _ARTICLE.search(before):
        before = before[: own.start()] + own[1][0] + article[1:] + own[2]
    starts_caption = not before and caption[0].isupper()
    return before + (noun[0].upper() + noun[1:] if starts_caption or _has_capital(caption, mention) else noun) + after


_MAX_CANDIDATES = 200
"""Number of candidates compared for a partner; more would take minutes."""
_MAX_SIMILARITY = 0.7
"""Captions with a higher Jaccard similarity count as equivalent where objects are not annotated."""

Pair = tuple[Scene, Scene]


def match_pairs(
    scenes: Sequence[Scene], fitness: Callable[[Scene, Scene], float], *, enough: float
) -> tuple[list[Pair], list[Scene]]:
    """Pairs of scenes, and scenes without a partner; each in turn takes the best of the next candidates.

    Args:
        scenes: Scenes in order.
        fitness: Score of a pair; 0 excludes it.
        enough: Score at which the search for a partner stops.
    """
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
    """1 where each scene's caption is certainly false for the other, else 0."""
    return float(is_false_caption(one, other) and is_false_caption(other, one))


def swap_fitness(one: Scene, other: Scene) -> float:
    """2 where nouns of one category can be swapped, 1 where only others can, 0 where none can."""
    if one.objects is None or other.objects is None or not mutually_false(one, other):
        return 0.0
    return max((1.0 + alike for _, _, alike in _swappable(one, other)), default=0.0)


def nearest_pairs(scenes: Sequence[Scene]) -> list[Pair]:
    """Each scene in turn with the remaining one whose caption has the most words in common (Jaccard)."""
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


def is_false_caption(source: Scene, target: Scene) -> bool:
    """Whether the caption of ``source`` is certainly false for ``target``."""
    named = find_mentions(source.caption, _object_names(source))
    if not named or target.objects is None:
        return all(jaccard(source.caption, caption) <= _MAX_SIMILARITY for caption in target.captions)
    there = _object_names(target)
    return any(each.name not in there and not _any_caption_mentions(target, each.name) for each in named)


def _any_caption_mentions(scene: Scene, name: str) -> bool:
    """Whether any caption of a scene names it, unused ones included."""
    return any(mentions_name(caption, name) for caption in scene.captions)


def _object_names(scene: Scene) -> frozenset[str]:
    return frozenset(each.name for each in scene.objects or ())


def _swappable(one: Scene, other: Scene) -> list[tuple[NounMention, NounMention, bool]]:
    """Pairs of nouns that may be swapped and fit each other's place, and whether they are of one category."""
    return [
        (a, b, _category(one, a) == _category(other, b))
        for a in _absent_mentions(one, other)
        for b in _absent_mentions(other, one)
        if (a.is_plural, bool(a.article)) == (b.is_plural, bool(b.article))
    ]


def nouns_to_swap(one: Scene, other: Scene) -> tuple[NounMention, NounMention]:
    """The nouns that two scenes swap; ``swap_fitness`` must be positive."""
    a, b, _ = max(_swappable(one, other), key=lambda trade: trade[2])
    return a, b


def _absent_mentions(one: Scene, other: Scene) -> list[NounMention]:
    """What the first caption names and the second scene neither contains nor mentions, nor anything similar."""
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
