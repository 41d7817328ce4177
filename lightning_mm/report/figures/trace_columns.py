"""The columns of a trace's heat map: a token each, or narrow parts of a run of tokens of one kind.

Data flow: ``traces.Trace`` -> columns with their places -> ``trace_maps`` fills and labels them.

Shapes: T tokens -> C columns from ``LEFT`` to the right, in drawing units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from lightning_mm.report.tables.traces import Trace

WIDTH, LEFT = 1020.0, 64.0
_RIGHT, _COLUMN, _WIDEST, _NARROW, _GAP = 16.0, 10.5, 34.0, 6.0, 5.0
_PARTS, _MOST_PARTS, _RUN = 16, 48, 4
_MOST_CELLS = 9000
_IMAGE = ("image_early", "image_late")


@dataclass(frozen=True)
class Column:
    """What is drawn as one column.

    Args:
        first: Index of its first token.
        end: One past its last.
        kind: What these tokens are.
        run: Of how many tokens the run is that it is a part of; 0 for a token by itself.
        x: Its left edge.
        width: Of it.
    """

    first: int
    end: int
    kind: str
    run: int = 0
    x: float = 0.0
    width: float = 0.0


def columns(trace: Trace) -> tuple[list[Column], int]:
    """Columns from left to right, and how many tokens have no room; ever more kinds of runs are drawn narrow."""
    room, most = WIDTH - LEFT - _RIGHT, max(16, _MOST_CELLS // len(trace.layers))
    found: list[Column] = []
    for narrow in (("image",), ("image", "template"), ("image", "template", "question", ""), None):
        found = _cut(trace, narrow)
        if len(found) <= most and _extent(found, _COLUMN) <= room:
            break
    while len(found) > 1 and (len(found) > most or _extent(found, _COLUMN) > room):
        found = found[: max(1, min(most, len(found) - max(1, len(found) // 8)))]
    letters = sum(not column.run for column in found)
    width = min(_WIDEST, max(_COLUMN, (room - _extent(found, 0.0)) / letters)) if letters else 0.0
    return _placed(found, width), len(trace.tokens) - found[-1].end


def _cut(trace: Trace, narrow: Sequence[str] | None) -> list[Column]:
    """Tokens by themselves, and runs of the kinds named (None: of any) in parts that are about equally long."""
    kinds = ["image" if kind in _IMAGE else kind for kind in trace.classes]
    runs = [list(group) for _, group in groupby(range(len(kinds)), key=lambda i: kinds[i])]
    thin = [len(run) > _RUN and (narrow is None or kinds[run[0]] in narrow) for run in runs]
    parts = max(1, min(_PARTS, _MOST_PARTS // max(1, sum(thin))))
    found: list[Column] = []
    for run, is_thin in zip(runs, thin, strict=True):
        count = min(parts, len(run)) if is_thin else len(run)
        cuts = [run[0] + len(run) * i // count for i in range(count + 1)]
        size = sum(trace.sizes[run[0] : run[-1] + 1]) if is_thin else 0
        found += [Column(first, end, kinds[run[0]], size) for first, end in pairwise(cuts)]
    return found


def _extent(found: Sequence[Column], width: float) -> float:
    """How wide columns are together, tokens by themselves being ``width``, with the gaps about runs."""
    turns = sum(_apart(a, b) for a, b in pairwise(found))
    return sum(_NARROW if column.run else width for column in found) + _GAP * turns


def _apart(one: Column, other: Column) -> bool:
    """Whether a gap stands between: about runs."""
    return bool(one.run or other.run) and (one.run, one.kind) != (other.run, other.kind)


def _placed(found: Sequence[Column], width: float) -> list[Column]:
    placed: list[Column] = []
    x = LEFT
    for column in found:
        x += _GAP if placed and _apart(placed[-1], column) else 0.0
        placed.append(replace(column, x=x, width=_NARROW if column.run else width))
        x += placed[-1].width
    return placed
