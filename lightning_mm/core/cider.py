"""CIDEr-D: how alike captions are to several references, by words that few pictures share.

After Vedantam et al. 2015, arXiv:1411.5726, with the clipping, the length penalty and the counts of the coco-caption
code (``pycocoevalcap``), which published numbers come from: for each n of 1 to 4, tf-idf vectors of n-grams, a cosine
in which no n-gram counts more often than the reference has it, times exp(-d^2 / (2 6^2)) with the difference d of the
numbers of bigrams; the mean over n and references, times 10. An n-gram's document frequency is the number of questions
with it in any reference, so that scores depend on all questions: one question alone has none. A caption of one word has
no bigrams, and at most 2.5.

Data flow: answers and their references -> ``words`` -> n-grams -> ``cider``: one score per question.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

NUM_ORDERS, SIGMA, SCALE = 4, 6.0, 10.0
_CLITICS = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_TOKEN = re.compile(r"n't|'(?:s|re|ve|ll|d|m)\b|\w+(?:-\w+)*|[^\w\s]")
_DROPPED = frozenset("'`.?!,:-;\"()[]{}")

Counts = Counter[tuple[str, ...]]


def words(text: str) -> list[str]:
    """Words in lower case without punctuation; clitics are words.

    Approximates the tokenizer of coco-caption (Stanford's PTBTokenizer, then its list of punctuation).

    Example:
        >>> words("The man's dog isn't big, it is well-fed.")
        ['the', 'man', "'s", 'dog', 'is', "n't", 'big', 'it', 'is', 'well-fed']
    """
    spaced = _CLITICS.sub(r" \1", text.lower().replace("\u2019", "'"))
    return [token for token in _TOKEN.findall(spaced) if token not in _DROPPED]


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The CIDEr-D of each answer, 0 to 10; a corpus's is their mean.

    Args:
        answers: One for each question.
        references: One or more texts for each question.

    Example:
        >>> cider(["a red car on a road", "two cats"], [["a red car on a road"], ["three dogs lie there"]])
        [10.0, 0.0]
    """
    assert len(answers) == len(references) > 1, "document frequencies need several questions"
    assert all(references), "every question has a reference"
    cooked = [[_ngrams(text) for text in texts] for texts in references]
    frequency = Counter(ngram for texts in cooked for ngram in set().union(*texts))
    top = math.log(len(answers))

    def weights(counts: Counts) -> dict[tuple[str, ...], float]:
        return {ngram: count * (top - math.log(max(1, frequency[ngram]))) for ngram, count in counts.items()}

    scores = []
    for answer, texts in zip(map(_ngrams, answers), cooked, strict=True):
        mine = weights(answer)
        each = [_similarity(mine, weights(text), _num_bigrams(answer) - _num_bigrams(text)) for text in texts]
        scores.append(SCALE * sum(each) / len(each))
    return scores


def _ngrams(text: str) -> Counts:
    tokens = words(text)
    return Counter(
        tuple(tokens[at : at + order]) for order in range(1, NUM_ORDERS + 1) for at in range(len(tokens) - order + 1)
    )


def _num_bigrams(counts: Counts) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _similarity(mine: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float], difference: int) -> float:
    """Clipped cosine, mean over the orders, with the penalty of length; orders without weight count 0."""
    dots, own, other = ([0.0] * NUM_ORDERS for _ in range(3))
    for ngram, weight in mine.items():
        own[len(ngram) - 1] += weight * weight
        dots[len(ngram) - 1] += min(weight, theirs.get(ngram, 0.0)) * theirs.get(ngram, 0.0)
    for ngram, weight in theirs.items():
        other[len(ngram) - 1] += weight * weight
    cosines = [dot / math.sqrt(a * b) for dot, a, b in zip(dots, own, other, strict=True) if a * b > 0]
    return sum(cosines) / NUM_ORDERS * math.exp(-(difference**2) / (2 * SIGMA**2))
