"""Attention on CPUs, where torch's fused kernel is slow if gradients flow.

Data flow: transformers' "sdpa" -> rows of a few hundred tokens by ``RowsAttention``: queries, keys and values of all
tokens + the position of each row -> outputs of all tokens; longer rows by torch's kernel in float32.

``RowsAttention`` computes one row after the other by two matrix products and a softmax, with a backward of its own. It
stores the attention weights of all pairs for backward, does not pad, and does not repeat keys that several query heads
share.

Measured on two cores with AMX, 9 query heads of 64 over 3 key heads, forward and backward, uneven rows of 120 to 156
tokens: torch's bfloat16 kernel takes 1.4 to 1.9 times as long as its float32 kernel, and is less accurate; the float32
kernel takes 2.2 times as long as ``RowsAttention``. At 500 tokens they are even.

Shapes: B rows, T tokens of all rows, H query heads, G key heads (H / G query heads share one), Q queries and K keys of
a row, E head size, F value size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.models.attention.dispatch import AttentionFunction, attention_modules, change_attention


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of equal length.

    Args:
        queries: Their tokens among the queries of all rows.
        keys: Their tokens among the keys of all rows.
        count: Number of rows.
        mask: (count or 1, 1 or H, Q, K) added to the scores; None if every query attends to every key.
    """

    queries: slice
    keys: slice
    count: int
    mask: Tensor | None


_MetaKernel = Callable[[Tensor, Tensor, Tensor, Sequence[Rows]], Tensor]
_meta_kernel: ContextVar[_MetaKernel | None] = ContextVar("attention kernel on the meta device", default=None)


@contextmanager
def meta_attention_kernel(stand_in: _MetaKernel) -> Iterator[None]:
    """While active, the meta device counts as a CPU and ``stand_in`` replaces the attention of short rows.

    Args:
        stand_in: Takes queries (T, H, E), keys (T, G, E), values (T, G, F) and the rows; returns (T, H, F).
    """
    held = _meta_kernel.set(stand_in)
    try:
        yield
    finally:
        _meta_kernel.reset(held)


def current_meta_kernel() -> _MetaKernel | None:
    """The kernel set by ``meta_attention_kernel``; None outside of it."""
    return _meta_kernel.get()


class RowsAttention(torch.autograd.Function):
    """Attention by row in float32 or wider, with a backward of its own.

    Query heads that share a key head are folded into one long row, so that keys are not repeated.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: Sequence[Rows], scale: float, given: torch.dtype
    ) -> Tensor:
        """Attention outputs (T, H, F).

        Args:
            ctx: Saves what backward needs.
            query: (T, H, E).
            key: (T, G, E).
            value: (T, G, F).
            rows: The rows, which cover all tokens.
            scale: Factor of the scores.
            given: dtype of the output.
        """
        out = query.new_empty(*query.shape[:2], value.shape[-1], dtype=given)
        saved: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            for each in rows:
                q = _fold_heads(query[each.queries], each.count, key.shape[1]).mul_(scale)
                k, v = (_fold_heads(t[each.keys], each.count, key.shape[1]) for t in (key, value))
                scores = torch.bmm(q, k.mT)
                if each.mask is not None:
                    scores.view(each.count, query.shape[1], -1, k.shape[1]).add_(each.mask)
                weights = scores.softmax(-1)
                _unfold_heads(torch.bmm(weights, v), out[each.queries], each.count)
                saved += (q, k, v, weights)
        ctx.save_for_backward(*saved)
        ctx.rows, ctx.scale, ctx.like = rows, scale, [(t.shape, t.dtype) for t in (query, key, value)]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Gradients of query, key and value, None where not needed, of the gradient (T, H, F)."""
        of_query, of_key, of_value = found = [
            gradient.new_empty(shape, dtype=dtype) if needed else None
            for (shape, dtype), needed in zip(ctx.like, ctx.needs_input_grad, strict=False)
        ]
        groups = ctx.like[1][0][1]
        saved = iter(ctx.saved_tensors)
        with torch.autocast("cpu", enabled=False):
            for each, q, k, v, weights in zip(ctx.rows, saved, saved, saved, saved, strict=False):
                out = _fold_heads(gradient[each.queries], each.count, groups)
                if of_value is not None:
                    _unfold_heads(torch.bmm(weights.mT, out), of_value[each.keys], each.count)
                if of_query is None and of_key is None:
                    continue
                of_weights = torch.bmm(out, v.mT)
                scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                if of_query is not None:
                    _unfold_heads(torch.bmm(scores, k).mul_(ctx.scale), of_query[each.queries], each.count)
                if of_key is not None:
                    _unfold_heads(torch.bmm(scores.mT, q), of_key[each.keys], each.count)
        return *found, None, None, None


def _fold_heads(tokens: Tensor, rows: int, groups: int) -> Tensor:
    """(rows * Q, H, E) -> (rows * G, H / G * Q, E) in float32 or wider, in one copy."""
    there = tokens.unflatten(0, (rows, -1)).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return torch.empty(there.shape, dtype=wide, device=tokens.device).copy_(there).flatten(2, 3).flatten(0, 1)


def _unfold_heads(folded: Tensor, out: Tensor, rows: int) -> None:
    """(rows * G, H / G * Q, E) -> into (rows * Q, H, E)."""
    groups = len(folded) // rows
    there = out.unflatten(0, (rows, -1)).unflatten(2, (groups, -1))
    there.copy_(folded.view(rows, groups, there.shape[3], -1, out.shape[-1]).permute(0, 3, 1, 2, 4))


MAX_SHORT_ROW = 256
"""Longest row, in tokens, whose attention weights of all pairs are small enough to be stored for backward."""

MIN_MEAN_ROW = 64
"""Mean tokens per row from which on a row's matrix products are large enough to be computed one row at a time."""

_MASKED_SCORE = -1e4
"""A pair whose mask adds at most this to its score has no attention weight."""

_UNSUPPORTED_OPTIONS = ("position_bias", "cache", "softcap")


def use_cpu_attention(model: nn.Module, undo: ExitStack) -> None:
    """Replace the model's sdpa attention on CPUs where gradients flow through it; elsewhere nothing changes.

    Args:
        model: Any transformers model; its attention modules keep their names and configs.
        undo: Gets the callbacks that restore the attention.
    """
    change_attention(undo, attention_modules(model), lambda name, attend, _: cpu_attention(attend, name))


def cpu_attention(attend: AttentionFunction, name: str = "sdpa") -> AttentionFunction:
    """The attention function with CPU kernels where gradients flow, if it is sdpa's; else the function itself.

    Args:
        attend: An attention function.
        name: Its name in transformers' registry.
    """
    return _cpu_attention(attend) if name == "sdpa" and not hasattr(attend, "attend_unpadded") else attend


def _cpu_attention(attend: AttentionFunction) -> AttentionFunction:

    @wraps(attend)
    def run(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not _gradients_flow(query):
            return attend(module, query, key, value, attention_mask, *args, **options)
        if _is_plain(attention_mask, args, options) and query.shape[2] * key.shape[2] <= MAX_SHORT_ROW**2:
            return _attend_short_rows(module, query, key, value, attention_mask, options), None
        narrow = _runs_in_bfloat16(query)
        given = (query, key, value, attention_mask, *args)
        if narrow:
            given, options = tuple(map(_to_float32, given)), {name: _to_float32(each) for name, each in options.items()}
        # Autocast would cast them to bfloat16 again.
        with torch.autocast("cpu", enabled=False):
            output, weights = attend(module, *given, **options)
        return output.to(torch.bfloat16) if narrow else output, weights

    def attend_unpadded(
        rows_of: Callable[[object], Sequence[Rows]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **options: Any,
    ) -> Tensor | None:
        """Attention (1, T, H, F) of unpadded rows side by side; None if they are to be computed as padded rows.

        Args:
            rows_of: Returns the rows under a mask, as ``RealTokens.split_rows``.
            query: (1, H, T, E).
            key: (1, G, T, E).
            value: (1, G, T, F).
            attention_mask: The model's mask of the padded rows.
            args: Further arguments of the attention function; any prevent this kernel.
            options: Keyword arguments of the attention function.
        """
        if not (_gradients_flow(query) and _is_plain(attention_mask, args, options)):
            return None
        rows = rows_of(attention_mask)
        query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
        return _attend_rows(query, key, value, rows, options)[None] if rows else None

    run.attend_unpadded = attend_unpadded  # type: ignore[attr-defined]
    return run


def attends_row_by_row(lengths: Sequence[int]) -> bool:
    """Whether rows of these lengths, in tokens, are computed one at a time."""
    return len(lengths) > 0 and max(lengths) <= MAX_SHORT_ROW and sum(lengths) >= MIN_MEAN_ROW * len(lengths)


def split_unpadded_rows(index: Tensor, rows: int, length: int, mask: object) -> tuple[Rows, ...]:
    """Rows of real tokens side by side; empty if attention is to be computed on padded rows.

    Args:
        index: (T,) flat indices of the real tokens into rows * length, ascending.
        rows: Number of rows B.
        length: Tokens of a row with its padding.
        mask: The model's mask (B or 1, 1 or H, length, length), boolean or added to the scores.
    """
    lengths: list[int] = torch.bincount(index // length, minlength=rows).tolist()
    if not isinstance(mask, Tensor) or mask.ndim != 4 or not attends_row_by_row([each for each in lengths if each]):
        return ()
    found = []
    start = 0
    for row, count in enumerate(lengths):
        if not count:
            continue
        span = slice(start, start + count)
        places = index[span] % length
        added = _additive_mask(mask[row if len(mask) > 1 else 0, :, places])
        own = added[..., places]
        if (added > _MASKED_SCORE).sum() != (own > _MASKED_SCORE).sum():
            return ()  # real tokens see padding
        found.append(Rows(span, span, 1, own[None].contiguous()))
        start += count
    return tuple(found)


def split_groups(
    index: Tensor, rows: int, length: int, mask: object, owner: Sequence[int], shared: Sequence[int]
) -> tuple[Rows, ...]:
    """As ``split_unpadded_rows``, where rows share first tokens: one row per group.

    A token sees in it what it sees in its own row.

    Args:
        index: (T,) flat indices of the tokens that are computed into rows * length, ascending.
        rows: Number of rows B.
        length: Tokens of a row with its padding.
        mask: The model's mask (B or 1, 1 or H, length, length), boolean or added to the scores.
        owner: Row that computes the first tokens of each row.
        shared: Number of those tokens of each row.
    """
    row_of = index // length
    lengths = torch.bincount(torch.tensor(owner, device=index.device)[row_of], minlength=rows).tolist()
    if not isinstance(mask, Tensor) or mask.ndim != 4 or not attends_row_by_row([each for each in lengths if each]):
        return ()
    found = []
    start = 0
    for count in filter(None, lengths):
        span = slice(start, start + count)
        row, place = row_of[span], index[span] % length
        sees = (row[:, None] == row) | ((row == row[0]) & (place < torch.tensor(shared)[row][:, None]))
        added = _additive_mask(mask[row if len(mask) > 1 else torch.zeros_like(row), :, place])  # (Q, 1 or H, L)
        own = added[..., place].masked_fill(~sees[:, None], torch.finfo(torch.float32).min)
        if (added > _MASKED_SCORE).sum() != (own > _MASKED_SCORE).sum():
            return ()  # tokens see padding, or what stands behind the shared ones
        found.append(Rows(span, span, 1, own.transpose(0, 1)[None].contiguous()))
        start += count
    return tuple(found)


def _gradients_flow(query: Tensor) -> bool:
    """Whether gradients flow through this attention, on a CPU and outside of torch.compile."""
    here = query.device.type == "cpu" or (query.device.type == "meta" and current_meta_kernel() is not None)
    here = here and query.ndim == 4 and not torch.compiler.is_compiling()
    return here and torch.is_grad_enabled() and query.requires_grad


def _is_plain(mask: object, args: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether it is scaled dot-product attention without dropout and other options, under a mask without gradient."""
    learned = isinstance(mask, Tensor) and mask.requires_grad
    more = args or options.get("dropout") or any(options.get(name) is not None for name in _UNSUPPORTED_OPTIONS)
    return not learned and not more


def _attend_short_rows(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Attention (B, Q, H, F) of (B, H, Q, E), (B, G, K, E), (B, G, K, F); causal on transformers' conditions."""
    length, asked = query.shape[2], options.get("is_causal")
    if mask is None and length > 1 and (getattr(module, "is_causal", True) if asked is None else asked):
        key, value = key[:, :, :length], value[:, :, :length]  # a KV cache that recomputation fills again is longer
        mask = torch.ones(length, key.shape[2], dtype=torch.bool).tril()
    rows = Rows(slice(None), slice(None), len(query), None if mask is None else _additive_mask(mask))
    query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    return _attend_rows(query, key, value, (rows,), options).unflatten(0, (rows.count, -1))


def _runs_in_bfloat16(query: Tensor) -> bool:
    """Whether sdpa would run in bfloat16: rotary positions give float32 queries, which autocast casts."""
    narrow = query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if narrow:
        log_decision("attention", "float32 where gradients flow", "its bfloat16 backward is slower on this processor")
    return narrow


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _additive_mask(mask: Tensor) -> Tensor:
    """The mask as an addend of the scores; finite, so that a padding query without any key gives no NaN."""
    if mask.dtype != torch.bool:
        return mask.clamp(min=torch.finfo(torch.float32).min)
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


def _attend_rows(query: Tensor, key: Tensor, value: Tensor, rows: Sequence[Rows], options: dict[str, Any]) -> Tensor:
    """Attention (T, H, F) of (T, H, E), (T, G, E), (T, G, F): ``scaled_dot_product_attention`` of each row."""
    if (stand_in := current_meta_kernel()) is not None:
        return stand_in(query, key, value, rows)
    given = torch.bfloat16 if _runs_in_bfloat16(query) else query.dtype
    scale = options.get("scaling")
    out: Tensor = RowsAttention.apply(
        query, key, value, rows, query.shape[-1] ** -0.5 if scale is None else scale, given
    )
    return out
