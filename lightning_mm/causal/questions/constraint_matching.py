"""Finds where a constraint stands in its question, by written rules.

Data flow: question and constraint, as text -> ``find_constraint`` -> ``ConstraintMatch``: all occurrences, and the rule
that found them -> ``files``.

Rules, in order; each works on what the one before left of the constraint, and the first that finds an occurrence is the
last one tried:
    exact        as written (runs of whitespace count as equal)
    case         ignoring case
    punctuation  without the punctuation around it: "a?" is "a"
    determiner   without an article or demonstrative before it: "the suit" is "suit" in "What brand of suit is it?"
    number       with its last word in the other number: "dog" is "dogs", "cities" is "city"; regular forms only
Only whole words match ("art" does not match in "party"), except in scripts without spaces between words. Every rule
finds all occurrences, ignoring case: an occurrence that is left out would not be corrupted, and would reveal the
constraint.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

Span = tuple[int, int]
RULES = ("exact", "case", "punctuation", "determiner", "number")
_DETERMINERS = frozenset({"a", "an", "the", "this", "that", "these", "those"})
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Thai, Lao, Burmese, Khmer, kana and Han: scripts without spaces between words."""


@dataclass(frozen=True)
class ConstraintMatch:
    """All occurrences of a constraint in a question.

    Args:
        spans: Character range of each occurrence, (first, one past the last), in order.
        rule: The rule that found them, one of ``RULES``.
    """

    spans: tuple[Span, ...]
    rule: str


def find_constraint(constraint: str, question: str) -> ConstraintMatch | None:
    """All occurrences of a constraint in a question; None if no rule finds it.

    Example:
        >>> find_constraint("the suit", "What brand of suit is the man wearing?")
        ConstraintMatch(spans=((14, 18),), rule='determiner')
        >>> find_constraint("the hat", "What brand of suit is the man wearing?") is None
        True
    """
    plain = _without_punctuation(constraint)
    head, _, rest = plain.partition(" ")
    noun = rest if head.casefold() in _DETERMINERS else plain
    tries = (("case", [constraint]), ("punctuation", [plain]), ("determiner", [noun]), ("number", _other_number(noun)))
    for rule, words in tries:
        places = [span for each in words for span in _occurrences(each, question)]
        if places:
            as_written = rule == "case" and all(
                _single_spaced(question[a:b]) == _single_spaced(constraint) for a, b in places
            )
            return ConstraintMatch(merge_spans(places), "exact" if as_written else rule)
    return None


def merge_spans(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Sorted ranges, with overlapping ones merged."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _occurrences(words: str, question: str) -> list[Span]:
    pattern = r"\s+".join(map(re.escape, words.split()))
    if not pattern:
        return []
    # A lookahead, so that overlapping occurrences are all found.
    spans = [match.span(1) for match in re.finditer(f"(?=({pattern}))", question, re.IGNORECASE)]
    return [(a, b) for a, b in spans if not _within_word(question, a) and not _within_word(question, b)]


def _within_word(text: str, at: int) -> bool:
    """Whether the characters before and after a boundary belong to one word."""
    return 0 < at < len(text) and _is_word_character(text[at - 1]) and _is_word_character(text[at])


def _is_word_character(character: str) -> bool:
    """Whether a character is a letter, digit or combining mark of a script that separates words."""
    return (character == "_" or unicodedata.category(character)[0] in "LMN") and not _UNSPACED.match(character)


def _without_punctuation(constraint: str) -> str:
    """A constraint with single spaces between words and without surrounding punctuation."""
    kept = [i for i, character in enumerate(constraint) if unicodedata.category(character)[0] in "LMNS"]
    return _single_spaced(constraint[kept[0] : kept[-1] + 1]) if kept else ""


def _single_spaced(text: str) -> str:
    return " ".join(text.split())


def _other_number(noun: str) -> list[str]:
    """A noun with its last word in the other number: all regular plural and singular forms."""
    *before, last = noun.split(" ")
    if len(last) < 3:
        return []
    forms = [last + "s", last + "es"]
    forms += [last[:-1] + "ies"] if last[-1] in "yY" else []
    forms += [last[:-3] + "y"] if last.casefold().endswith("ies") else []
    forms += [last[:-2]] if last.casefold().endswith("es") else []
    forms += [last[:-1]] if last.casefold().endswith("s") and not last.casefold().endswith("ss") else []
    return [" ".join([*before, form]) for form in forms]
