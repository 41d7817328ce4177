"""Attention on processors (CPUs), where torch's fused kernel is slow as soon as gradients flow.

Data flow: transformers' "sdpa" -> in float32, and in rows of a few hundred tokens as two products and a softmax.

Measured on two cores with AMX, 9 heads of 64, forward and backward: torch's bfloat16 kernel takes 1.4 to 1.9 times as
long as its float32 one, and loses more; and that one 1.8 times as long as the written-out products at 140 to 155
tokens, as long at 300, and half as long at 600.

Shapes: B rows, H heads, Q queries, K keys, E head size.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from lightning_mm.decisions import decide

SHORT = 256
"""Up to so many tokens a row, the weights of all pairs are small enough to be kept for backward."""


def attend_on_processors() -> None:
    """From now on, sdpa on a processor is computed so where gradients will flow through it; else it is left alone."""
    attend: Any = AttentionInterface._global_mapping["sdpa"]
    if not hasattr(attend, "on_processors"):
        AttentionInterface.register("sdpa", attending(attend))


def attending(attend: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' function for an attention kernel, with other arithmetic on processors."""

    @wraps(attend)
    def run(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        flows = query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad
        if not flows or torch.compiler.is_compiling():
            return attend(module, query, key, value, *args, **options)
        # Rotary positions make float32 of queries and keys; autocast narrows them just before the kernel.
        narrow = query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        short = query.shape[-2] * key.shape[-2] <= SHORT**2
        if narrow:
            decide("attention", "float32 where gradients flow", "its bfloat16 backward is slower on this processor")
            query, key, value = (_wide(each) for each in (query, key, value))
            args = tuple(_wide(each) for each in args)
            options = {name: _wide(each) for name, each in options.items()}
        # Autocast would narrow them again.
        with torch.autocast("cpu", enabled=False), WrittenOut() if short else nullcontext():
            output, weights = attend(module, query, key, value, *args, **options)
        return output.to(torch.bfloat16) if narrow else output, weights

    run.on_processors = True  # type: ignore[attr-defined]
    return run


class WrittenOut(TorchFunctionMode):
    """While active, fused attention is two matrix products and a softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attended(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """(B, H, Q, E) as ``scaled_dot_product_attention`` gives it."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores_BHQK = torch.matmul(query * (query.shape[-1] ** -0.5 if scale is None else scale), key.transpose(-2, -1))
    if is_causal:
        attn_mask = torch.ones(scores_BHQK.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores_BHQK += _added(attn_mask, scores_BHQK.dtype)
    weights_BHQK = scores_BHQK.softmax(-1)
    return torch.matmul(F.dropout(weights_BHQK, dropout_p) if dropout_p else weights_BHQK, value)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to scores. Finite, so that a row of padding that sees nothing gives numbers, too."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
