"""Where a constraint stands in its question, by stated rules and never by a guess.

Data flow: question and constraint, as text -> ``Found``: every place, and the rule that found them -> ``constraints``.

The rules, in order; each goes on with what the one before left of the constraint, and the first that finds a place is
the last that is tried:
    exact        it stands there as it is written (runs of blanks are all alike)
    case         so it does but for capitals
    punctuation  without the punctuation around it: "a?" is "a"
    determiner   without an article or a demonstrative before it: "the suit" is "suit" in "What brand of suit is it?"
    number       with its last word in the other number: "dog" is "dogs", "cities" is "city"; regular forms only
Only whole words count ("art" does not stand in "party"), except in scripts that put no blanks between words. Whichever
rule it is, all places are found, whatever their capitals: what one of them still told would not be corrupted.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

Span = tuple[int, int]
RULES = ("exact", "case", "punctuation", "determiner", "number")
_DETERMINERS = frozenset({"a", "an", "the", "this", "that", "these", "those"})
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Thai, Lao, Burmese, Khmer, kana and Han: written without blanks between words."""


@dataclass(frozen=True)
class Found:
    """Where a constraint stands.

    Args:
        spans: First character and one past the last of each place, in order.
        rule: One of ``RULES``.
    """

    spans: tuple[Span, ...]
    rule: str


def find(constraint: str, question: str) -> Found | None:
    """All places of a constraint in a question; None where no rule finds it.

    Example:
        >>> find("the suit", "What brand of suit is the man wearing?")
        Found(spans=((14, 18),), rule='determiner')
        >>> find("the hat", "What brand of suit is the man wearing?") is None
        True
    """
    plain = _bare(constraint)
    head, _, rest = plain.partition(" ")
    noun = rest if head.casefold() in _DETERMINERS else plain
    tries = (("case", [constraint]), ("punctuation", [plain]), ("determiner", [noun]), ("number", _other_number(noun)))
    for rule, words in tries:
        places = [span for each in words for span in _places(each, question)]
        if places:
            as_written = rule == "case" and all(_blanks(question[a:b]) == _blanks(constraint) for a, b in places)
            return Found(joined(places), "exact" if as_written else rule)
    return None


def joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    """In order, those that overlap as one: no character is in two."""
    made: list[Span] = []
    for start, end in sorted(spans):
        if made and start < made[-1][1]:
            made[-1] = (made[-1][0], max(end, made[-1][1]))
        else:
            made.append((start, end))
    return tuple(made)


def _places(words: str, question: str) -> list[Span]:
    pattern = r"\s+".join(map(re.escape, words.split()))
    if not pattern:
        return []
    # Looked for ahead, so that places that overlap are all found.
    spans = [match.span(1) for match in re.finditer(f"(?=({pattern}))", question, re.IGNORECASE)]
    return [(a, b) for a, b in spans if not _within_word(question, a) and not _within_word(question, b)]


def _within_word(text: str, at: int) -> bool:
    """Whether the characters before and after a place belong to one word."""
    return 0 < at < len(text) and _of_word(text[at - 1]) and _of_word(text[at])


def _of_word(character: str) -> bool:
    """Letters, digits and the marks on them, in scripts that separate words."""
    return (character == "_" or unicodedata.category(character)[0] in "LMN") and not _UNSPACED.match(character)


def _bare(constraint: str) -> str:
    """One blank between words, and no punctuation around them."""
    kept = [i for i, character in enumerate(constraint) if unicodedata.category(character)[0] in "LMNS"]
    return _blanks(constraint[kept[0] : kept[-1] + 1]) if kept else ""


def _blanks(text: str) -> str:
    return " ".join(text.split())


def _other_number(noun: str) -> list[str]:
    """Its last word in the plural, and in the singular: those of the regular forms that it can have."""
    *before, last = noun.split(" ")
    if len(last) < 3:
        return []
    forms = [last + "s", last + "es"]
    forms += [last[:-1] + "ies"] if last[-1] in "yY" else []
    forms += [last[:-3] + "y"] if last.casefold().endswith("ies") else []
    forms += [last[:-2]] if last.casefold().endswith("es") else []
    forms += [last[:-1]] if last.casefold().endswith("s") and not last.casefold().endswith("ss") else []
    return [" ".join([*before, form]) for form in forms]
