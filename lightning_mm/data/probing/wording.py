"""Nouns of captions: where a thing is named, and two captions with one noun traded.

Data flow: captions and the names of what is in the pictures -> ``mentions``, ``traded`` -> ``entailment``.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from lightning_mm.data.nano.wording import plural

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_ARTICLE = re.compile(r"\b(a|an)(\s+)$", re.IGNORECASE)
_STOP_WORDS = frozenset(
    ("a", "an", "the", "and", "or", "of", "in", "on", "at", "to", "by", "with", "for", "from", "into", "as", "is",
     "are", "was", "were", "be", "been", "being", "there", "this", "that", "these", "those", "it", "its", "his", "her",
     "their", "some")
)  # fmt: skip
"""Words that two captions share whatever they say."""


@dataclass(frozen=True)
class Mention:
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
def content(caption: str) -> frozenset[str]:
    """Its words without those that say little; all of them where none else is left.

    Example:
        >>> sorted(content("A cat on the mat")), sorted(content("This is it"))
        (['cat', 'mat'], ['is', 'it', 'this'])
    """
    said = frozenset(words(caption))
    return said - _STOP_WORDS or said


def likeness(one: str, other: str) -> float:
    """What share of all their content words two captions have in common (Jaccard), 0 to 1.

    Example:
        >>> likeness("A cat on a mat", "the cat is on the mat"), likeness("a red cat", "a blue cat")
        (1.0, 0.3333333333333333)
    """
    a, b = content(one), content(other)
    return len(a & b) / max(1, len(a | b))


@lru_cache(maxsize=8192)
def _pattern(name: str) -> re.Pattern[str]:
    many = plural(name.casefold())
    either = f"{re.escape(name)}|(?P<many>{re.escape(many)})" if many != name.casefold() else re.escape(name)
    return re.compile(rf"(?<![\w-])(?:{either})(?![\w-])", re.IGNORECASE)


@lru_cache(maxsize=8192)
def mentions(caption: str, names: frozenset[str]) -> tuple[Mention, ...]:
    """The things of these names that a caption names once; of two that overlap ("dog", "hot dog") the longer one."""
    found: list[Mention] = []
    for name in sorted(names, key=lambda name: (-len(name), name)):
        hits = [hit for hit in _pattern(name).finditer(caption) if not any(_overlap(hit.span(), m) for m in found)]
        if len(hits) == 1:
            article = _ARTICLE.search(caption[: hits[0].start()])
            is_plural = hits[0].groupdict().get("many") is not None or (not article and plural(name) == name)
            found.append(Mention(name, is_plural, article[1].lower() if article else "", *hits[0].span()))
    return tuple(found)


def speaks_of(caption: str, name: str) -> bool:
    """Whether a caption names a thing, once or several times."""
    return bool(_pattern(name).search(caption))


def _overlap(span: tuple[int, int], mention: Mention) -> bool:
    return span[0] < mention.end and mention.start < span[1]


def traded(one: str, a: Mention, other: str, b: Mention) -> tuple[str, str]:
    """Both captions, each with the other's noun in the place of its own.

    What a noun brings along is its article as its own caption has it ("a unicorn", "an owl"); what stays with the place
    is its capital. So nothing is to be seen in false captions alone.

    Example:
        >>> one, other = "An owl on a branch", "two men and a dog"
        >>> traded(one, *mentions(one, frozenset(["owl"])), other, *mentions(other, frozenset(["dog"])))
        ('A dog on a branch', 'two men and an owl')
    """
    return _replaced(one, a, _noun(other, b), b.article), _replaced(other, b, _noun(one, a), a.article)


def _has_capital(caption: str, mention: Mention) -> bool:
    """Whether the noun has a capital for where it stands (a sentence, a title) and not for what it is (a TV)."""
    noun = caption[mention.start : mention.end]
    return noun[0].isupper() and noun[1:] == noun[1:].lower() and (mention.start == 0 or mention.name[0].islower())


def _noun(caption: str, mention: Mention) -> str:
    noun = caption[mention.start : mention.end]
    return noun[0].lower() + noun[1:] if _has_capital(caption, mention) else noun


def _replaced(caption: str, mention: Mention, noun: str, article: str) -> str:
    before, after = caption[: mention.start], caption[mention.end :]
    if own := _ARTICLE.search(before):
        before = before[: own.start()] + own[1][0] + article[1:] + own[2]
    begins_so = not before and caption[0].isupper()
    return before + (noun[0].upper() + noun[1:] if begins_so or _has_capital(caption, mention) else noun) + after
