"""Nouns of captions: where a thing is named, and two captions with one noun traded.

Data flow: captions and the names of what is in the pictures -> ``mentions``, ``traded`` -> ``entailment``.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from lightning_mm.data.nano.wording import plural

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_ARTICLE = re.compile(r"\b(a|an)(\s+)$", re.IGNORECASE)


@dataclass(frozen=True)
class Mention:
    """A thing named in a caption.

    Args:
        name: Of the thing, in the singular.
        is_plural: Whether the caption speaks of several.
        has_article: Whether "a" or "an" stands before it.
        start: First character.
        end: One past the last.
    """

    name: str
    is_plural: bool
    has_article: bool
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
            is_plural = hits[0].groupdict().get("many") is not None
            has_article = _ARTICLE.search(caption[: hits[0].start()]) is not None
            found.append(Mention(name, is_plural, has_article, *hits[0].span()))
    return tuple(found)


def speaks_of(caption: str, name: str) -> bool:
    """Whether a caption names a thing, once or several times."""
    return bool(_pattern(name).search(caption))


def _overlap(span: tuple[int, int], mention: Mention) -> bool:
    return span[0] < mention.end and mention.start < span[1]


def traded(one: str, a: Mention, other: str, b: Mention) -> tuple[str, str]:
    """Both captions, each with the other's noun in the place of its own; "a" and "an" follow the new noun.

    Example:
        >>> one, other = "An owl on a branch", "two men and a dog"
        >>> traded(one, *mentions(one, frozenset(["owl"])), other, *mentions(other, frozenset(["dog"])))
        ('A dog on a branch', 'two men and an owl')
    """
    return _replaced(one, a, other[b.start : b.end]), _replaced(other, b, one[a.start : a.end])


def _replaced(caption: str, mention: Mention, noun: str) -> str:
    noun = noun[0].lower() + noun[1:]
    before, after = caption[: mention.start], caption[mention.end :]
    if article := _ARTICLE.search(before):
        letter = article[1][0]
        is_open = noun[0] in "aeiou" or noun.startswith("hour")
        before = before[: article.start()] + letter + ("n" if is_open else "") + article[2]
    return before + (noun if before else noun[0].upper() + noun[1:]) + after
