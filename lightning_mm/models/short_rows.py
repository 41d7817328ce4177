"""Attention of short rows, one after the other: two products and a softmax, and one backward written for them.

Data flow: queries, keys and values of all tokens + where each row stands -> outputs of all tokens. Weights of all pairs
are kept for backward; nothing is padded, and keys that several queries share are not repeated.

Shapes: T tokens of all rows, H heads, G heads of keys (H / G queries share one), Q queries and K keys of a row, E head
size, F size of a value.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Some rows of equal length, one after the other.

    Args:
        queries: Where they stand among the tokens of all queries.
        keys: The same of the keys.
        count: How many rows.
        mask: (count or 1, 1 or H, Q, K) added to the scores; None where every query sees every key.
    """

    queries: slice
    keys: slice
    count: int
    mask: Tensor | None


_StandIn = Callable[[Tensor, Tensor, Tensor, Sequence[Rows]], Tensor]
_stand_in: ContextVar[_StandIn | None] = ContextVar("what stands for attention where there are no values", default=None)


@contextmanager
def rehearsed(stand_in: _StandIn) -> Iterator[None]:
    """While active, the meta device is a processor, on which this stands for the attention of short rows.

    Args:
        stand_in: (T, H, E), (T, G, E), (T, G, F) and the rows -> (T, H, F).
    """
    held = _stand_in.set(stand_in)
    try:
        yield
    finally:
        _stand_in.reset(held)


def standing_in() -> _StandIn | None:
    """What stands for the attention of short rows at present, if anything does."""
    return _stand_in.get()


class RowsAttention(torch.autograd.Function):
    """(T, H, E), (T, G, E), (T, G, F), the rows, the scores' scale, the output's type -> (T, H, F).

    Computed in float32 or wider. Queries that share their keys are one long row, so that keys are not repeated.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: Sequence[Rows], scale: float, given: torch.dtype
    ) -> Tensor:
        out = query.new_empty(*query.shape[:2], value.shape[-1], dtype=given)
        saved: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            for each in rows:
                q = _folded(query[each.queries], each.count, key.shape[1]).mul_(scale)
                k, v = (_folded(t[each.keys], each.count, key.shape[1]) for t in (key, value))
                scores = torch.bmm(q, k.mT)
                if each.mask is not None:
                    scores.view(each.count, query.shape[1], -1, k.shape[1]).add_(each.mask)
                weights = scores.softmax(-1)
                _unfold(torch.bmm(weights, v), out[each.queries], each.count)
                saved += (q, k, v, weights)
        ctx.save_for_backward(*saved)
        ctx.rows, ctx.scale, ctx.like = rows, scale, [(t.shape, t.dtype) for t in (query, key, value)]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        of_query, of_key, of_value = found = [
            gradient.new_empty(shape, dtype=dtype) if needed else None
            for (shape, dtype), needed in zip(ctx.like, ctx.needs_input_grad, strict=False)
        ]
        groups = ctx.like[1][0][1]
        saved = iter(ctx.saved_tensors)
        with torch.autocast("cpu", enabled=False):
            for each, q, k, v, weights in zip(ctx.rows, saved, saved, saved, saved, strict=False):
                out = _folded(gradient[each.queries], each.count, groups)
                if of_value is not None:
                    _unfold(torch.bmm(weights.mT, out), of_value[each.keys], each.count)
                if of_query is None and of_key is None:
                    continue
                of_weights = torch.bmm(out, v.mT)
                scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                if of_query is not None:
                    _unfold(torch.bmm(scores, k).mul_(ctx.scale), of_query[each.queries], each.count)
                if of_key is not None:
                    _unfold(torch.bmm(scores.mT, q), of_key[each.keys], each.count)
        return *found, None, None, None


def _folded(tokens: Tensor, rows: int, groups: int) -> Tensor:
    """(rows * Q, H, E) -> (rows * G, H / G * Q, E) in float32 or wider, in one copy."""
    there = tokens.unflatten(0, (rows, -1)).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return torch.empty(there.shape, dtype=wide, device=tokens.device).copy_(there).flatten(2, 3).flatten(0, 1)


def _unfold(folded: Tensor, out: Tensor, rows: int) -> None:
    """(rows * G, H / G * Q, E) -> into (rows * Q, H, E)."""
    groups = len(folded) // rows
    there = out.unflatten(0, (rows, -1)).unflatten(2, (groups, -1))
    there.copy_(folded.view(rows, groups, there.shape[3], -1, out.shape[-1]).permute(0, 3, 1, 2, 4))
