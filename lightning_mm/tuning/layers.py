"""Layer ranges: the grammar in which a user names decoder blocks.

Data flow: a spec from the config + the model's number of layers -> sorted, 0-based block indices.

Grammar (terms may be joined with commas):
    all                     every block
    7                       one block
    6-16                    blocks 6 to 16, both included
    25%-50%                 blocks whose middle lies in that part of the depth
    first:8   last:25%      a count, or a share of the depth
    middle:8                the same, around half depth
    uniform:25%             that many, evenly spread
    random:25%:7            that many, drawn with seed 7 (seed 0 if none is given)
"""

import random
import re
from collections.abc import Sequence

from lightning_mm.core.errors import UserError

LayerSpec = str | int | list[int]

_GRAMMAR = (
    "Write '6-16', '25%-50%', 'first:8', 'last:25%', 'middle:8', 'uniform:25%', 'random:25%:7', 'all' or [3, 7, 11]."
)


def resolve_layers(spec: LayerSpec | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Block indices named by a spec.

    Args:
        spec: See the grammar above.
        num_layers: How many decoder blocks the model has.

    Returns:
        Sorted indices in ``[0, num_layers)``, each once.

    Raises:
        UserError: The spec cannot be read, names no block, or names one that does not exist.

    Example:
        >>> resolve_layers("25%-50%", 32)
        (8, 9, 10, 11, 12, 13, 14, 15)
        >>> resolve_layers("uniform:25%", 16)
        (2, 6, 10, 14)
        >>> resolve_layers("0-1,last:1", 8)
        (0, 1, 7)
    """
    if not isinstance(num_layers, int) or num_layers < 1:
        raise UserError(
            f"num_layers is {num_layers!r:.60}.",
            "It is how many decoder blocks the model has.",
            "Give model.config.get_text_config(decoder=True).num_hidden_layers.",
        )
    terms = [str(term) for term in spec] if isinstance(spec, Sequence) and not isinstance(spec, str) else [str(spec)]
    named = [index for term in terms for piece in term.split(",") for index in _term(piece.strip(), num_layers, spec)]
    if not named:
        raise _error(spec, "It names no layer.")
    if outside := sorted({index for index in named if not 0 <= index < num_layers}):
        raise _error(spec, f"The model has layers 0 to {num_layers - 1}; {_shown(outside)} lies outside.")
    return tuple(sorted(set(named)))


def count_layers(spec: LayerSpec, num_layers: int) -> int:
    """How many blocks a budget allows: a count, a share ('25%'), or as many as a layer range names.

    Example:
        >>> count_layers("25%", 30), count_layers(11, 32), count_layers("6-16", 32)
        (8, 11, 11)
    """
    text = str(spec)
    if re.fullmatch(r"\d+%?", text):
        return _amount(text, num_layers, spec)
    return len(resolve_layers(spec, num_layers))


def describe_layers(indices: Sequence[int]) -> str:
    """Indices as runs.

    Example:
        >>> describe_layers([0, 1, 2, 5, 7, 8])
        '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _term(term: str, n: int, spec: object) -> Sequence[int]:
    if term == "all":
        return range(n)
    if term == "auto":
        raise _error(spec, "'auto' stands alone: it is written out by reading the model before anything else.")
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", term):
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise _error(spec, f"{low} is above {high}.")
        return range(low, high + 1)
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%-(\d+(?:\.\d+)?)%", term):
        low_share, high_share = float(match[1]) / 100, float(match[2]) / 100
        if not 0 <= low_share < high_share <= 1:
            raise _error(spec, "The two shares must rise, between 0% and 100%.")
        return [i for i in range(n) if low_share <= (i + 0.5) / n < high_share]
    if match := re.fullmatch(r"(first|last|middle|uniform|random):(\d+%?)(?::(\d+))?", term):
        return _pattern(match[1], _amount(match[2], n, spec), n, int(match[3] or 0))
    raise _error(spec, f"'{term}' is not a layer range.")


def _pattern(kind: str, count: int, n: int, seed: int) -> Sequence[int]:
    if kind == "first":
        return range(count)
    if kind == "last":
        return range(n - count, n)
    if kind == "middle":
        return range((n - count) // 2, (n - count) // 2 + count)
    if kind == "uniform":
        return [int((i + 0.5) * n / count) for i in range(count)]
    return random.Random(seed).sample(range(n), count)


def _amount(text: str, n: int, spec: object) -> int:
    count = int(n * int(text[:-1]) / 100 + 0.5) if text.endswith("%") else int(text)
    if not 1 <= count <= n:
        raise _error(spec, f"'{text}' asks for {count} of {n} layers.")
    return count


def _shown(indices: Sequence[int]) -> str:
    return describe_layers(indices[:100]) + (", ..." if len(indices) > 100 else "")


def _error(spec: object, why: str) -> UserError:
    return UserError(f"model.tuning: the layers {spec!r} cannot be resolved.", why, _GRAMMAR)
