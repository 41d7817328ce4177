"""Attention on processors (CPUs), where torch's fused kernel is slow as soon as gradients flow.

Data flow: transformers' "sdpa" -> rows of a few hundred tokens as ``short_rows`` computes them; other rows by torch's
kernel in float32.

Measured on two cores with AMX, 9 heads of 64 over 3 of keys, forward and backward, uneven rows of 120 to 156 tokens:
torch's bfloat16 kernel takes 1.4 to 1.9 times as long as its float32 one, and loses more; that one 2.2 times as long as
the products of ``short_rows``. At 500 tokens they are even.

Shapes: B rows, T tokens of all rows, H heads, G heads of keys, Q queries and K keys of a row, E head size, F size of a
value.

Attention of short rows, one after the other: two products and a softmax, and one backward written for them.

Data flow: queries, keys and values of all tokens + where each row stands -> outputs of all tokens. Weights of all pairs
are kept for backward; nothing is padded, and keys that several queries share are not repeated.

Shapes: T tokens of all rows, H heads, G heads of keys (H / G queries share one), Q queries and K keys of a row, E head
size, F size of a value.
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


SHORT = 256
"""Up to so many tokens a row, the weights of all pairs are small enough to be kept for backward."""

ALONE = 64
"""From so many tokens a row, in the mean, on, a row's products are large enough to be computed one row at a time."""

_UNSEEN = -1e4
"""What has no more than this added to its score has no weight."""

_OF_KERNELS_ONLY = ("position_bias", "cache", "softcap")


def use_cpu_attention(model: nn.Module, undo: ExitStack) -> None:
    """Compute the model's sdpa attention so on CPUs where gradients will flow through it; elsewhere nothing changes.

    Args:
        model: Its attention modules keep their names and configs.
        undo: Takes what puts their own attention back.
    """
    change_attention(undo, attention_modules(model), lambda name, attend, _: cpu_attention(attend, name))


def cpu_attention(attend: AttentionFunction, name: str = "sdpa") -> AttentionFunction:
    """An attention function with other arithmetic on CPUs, if it is sdpa's."""
    return _cpu_attention(attend) if name == "sdpa" and not hasattr(attend, "apart") else attend


def _cpu_attention(attend: Callable[..., Any]) -> Callable[..., Any]:

    @wraps(attend)
    def run(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not _flows(query):
            return attend(module, query, key, value, attention_mask, *args, **options)
        if _plain(attention_mask, args, options) and query.shape[2] * key.shape[2] <= SHORT**2:
            return _short(module, query, key, value, attention_mask, options), None
        narrow = _narrow(query)
        given = (query, key, value, attention_mask, *args)
        if narrow:
            given, options = tuple(map(_wide, given)), {name: _wide(each) for name, each in options.items()}
        # Autocast would narrow them again.
        with torch.autocast("cpu", enabled=False):
            output, weights = attend(module, *given, **options)
        return output.to(torch.bfloat16) if narrow else output, weights

    def apart(
        rows_of: Callable[[Any], Sequence[Rows]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **options: Any,
    ) -> Tensor | None:
        """(1, T, H, F) of (1, H, T, E) and so on, rows side by side; None where it is not to be computed so."""
        if not (_flows(query) and _plain(attention_mask, args, options)):
            return None
        rows = rows_of(attention_mask)
        query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
        return _attended(query, key, value, rows, options)[None] if rows else None

    run.apart = apart  # type: ignore[attr-defined]
    return run


def attended_apart(lengths: Sequence[int]) -> bool:
    """Whether rows of so many tokens are attended to one at a time."""
    return len(lengths) > 0 and max(lengths) <= SHORT and sum(lengths) >= ALONE * len(lengths)


def rows_apart(index: Tensor, rows: int, length: int, mask: Any) -> tuple[Rows, ...]:
    """Rows of real tokens side by side; none where they are attended to in rows of equal length.

    Args:
        index: (T,) real tokens, flat into rows * length, ascending.
        rows: B.
        length: Tokens of a row with its padding.
        mask: (B or 1, 1 or H, length, length), boolean or added to the scores, as the model made it.
    """
    lengths: list[int] = torch.bincount(index // length, minlength=rows).tolist()
    if not isinstance(mask, Tensor) or mask.ndim != 4 or not attended_apart([each for each in lengths if each]):
        return ()
    found = []
    start = 0
    for row, count in enumerate(lengths):
        if not count:
            continue
        span = slice(start, start + count)
        places = index[span] % length
        added = _added(mask[row if len(mask) > 1 else 0, :, places])
        own = added[..., places]
        if (added > _UNSEEN).sum() != (own > _UNSEEN).sum():
            return ()  # real tokens see padding
        found.append(Rows(span, span, 1, own[None].contiguous()))
        start += count
    return tuple(found)


def _flows(query: Tensor) -> bool:
    """Whether gradients will, here."""
    here = query.device.type == "cpu" or (query.device.type == "meta" and standing_in() is not None)
    here = here and query.ndim == 4 and not torch.compiler.is_compiling()
    return here and torch.is_grad_enabled() and query.requires_grad


def _plain(mask: Any, args: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether nothing is asked for but scaled products under a mask that nobody learns."""
    learned = isinstance(mask, Tensor) and mask.requires_grad
    more = args or options.get("dropout") or any(options.get(name) is not None for name in _OF_KERNELS_ONLY)
    return not learned and not more


def _short(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: dict[str, Any]) -> Tensor:
    """(B, Q, H, F) of (B, H, Q, E) and so on; what is causal is found out as transformers does it."""
    length, asked = query.shape[2], options.get("is_causal")
    if mask is None and length > 1 and (getattr(module, "is_causal", True) if asked is None else asked):
        key, value = key[:, :, :length], value[:, :, :length]  # a cache that recomputation fills again holds more
        mask = torch.ones(length, key.shape[2], dtype=torch.bool).tril()
    rows = Rows(slice(None), slice(None), len(query), None if mask is None else _added(mask))
    query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    return _attended(query, key, value, (rows,), options).unflatten(0, (rows.count, -1))


def _narrow(query: Tensor) -> bool:
    """Whether the kernel would run in bfloat16. Rotary positions make float32 of queries; autocast narrows them."""
    narrow = query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if narrow:
        log_decision("attention", "float32 where gradients flow", "its bfloat16 backward is slower on this processor")
    return narrow


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _added(mask: Tensor) -> Tensor:
    """What a mask adds to scores. Finite, so that a row of padding that sees nothing gives numbers, too."""
    if mask.dtype != torch.bool:
        return mask.clamp(min=torch.finfo(torch.float32).min)
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


def _attended(query: Tensor, key: Tensor, value: Tensor, rows: Sequence[Rows], options: dict[str, Any]) -> Tensor:
    """(T, H, F) of (T, H, E), (T, G, E) and (T, G, F), as ``scaled_dot_product_attention`` gives it by row."""
    if (stand_in := standing_in()) is not None:
        return stand_in(query, key, value, rows)
    given = torch.bfloat16 if _narrow(query) else query.dtype
    scale = options.get("scaling")
    out: Tensor = RowsAttention.apply(
        query, key, value, rows, query.shape[-1] ** -0.5 if scale is None else scale, given
    )
    return out
