"""Operations that a real device computes otherwise than the meta device writes them out.

Data flow: torch functions that the model calls on meta tensors -> ``FusedKernelsMode`` (attention and interpolation as
one kernel), ``MetaCpuAttention`` (attention of short rows on a CPU), ``MetaAutocast`` (types under bf16-mixed) ->
operations, and tensors saved for backward, as on the device.

Shapes: B rows, L tokens after padding, T real tokens of all rows, H heads, G heads of keys, Q queries, K keys, E head
size, F size of a value.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_mm.models.attention.cpu_kernels import Rows
from lightning_mm.planning.meta_modes import META, OpObserver, map_tensors

_aten = torch.ops.aten


class FusedKernelsMode(TorchFunctionMode):
    """While active, fused attention and interpolation of meta tensors are one operation each, as on a real device.

    Written out, attention would keep the weights of every pair for backward, and interpolation would take longer to
    trace than a block.

    Args:
        observe: Sees the two products of attention, as if they were written out.
    """

    def __init__(self, observe: OpObserver) -> None:
        super().__init__()
        self.observe = observe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].device == META:
            return self._attention(*args[:3])
        if func is F.interpolate and args[0].device == META:
            return _interpolate(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = _FusedAttention.apply(query, key, value)
        rows = query.shape[:-2]
        key_BHKE = key[..., :1, :, :].expand(*rows, *key.shape[-2:])
        value_BHKF = value[..., :1, :, :].expand(*rows, *value.shape[-2:])
        _observe_attention(self.observe, *(each.flatten(0, -3) for each in (query, key_BHKE, value_BHKF)))
        return out


class MetaCpuAttention:
    """Attention of short rows as ``models.attention.cpu_kernels`` computes it: its saved tensors and its products.

    Args:
        observe: Sees the two products, as rows that are padded to equal length would need them.
        shape: B, L.
        bf16: Whether its output is bfloat16, as under autocast.
    """

    def __init__(self, observe: OpObserver, shape: tuple[int, int], bf16: bool) -> None:
        self.observe, self.shape, self.bf16 = observe, shape, bf16

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, rows: Sequence[Rows]) -> Tensor:
        out: Tensor = _CpuAttention.apply(query, key, value, rows, torch.bfloat16 if self.bf16 else query.dtype)
        apart = rows[0].queries != slice(None)  # one row after the other, without padding
        count, length = self.shape if apart else (rows[0].count, len(query) // rows[0].count)
        keys = length if apart else len(key) // count
        heads, size = query.shape[1] * count, query.shape[2]
        padded = (query.new_empty(heads, length, size), query.new_empty(heads, keys, size))
        values = value.new_empty(heads, keys, value.shape[2])
        for made, like in zip((*padded, values), (query, key, value), strict=True):
            made.requires_grad_(like.requires_grad)
        _observe_attention(self.observe, *padded, values)
        return out


def _observe_attention(observe: OpObserver, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Report the two products of (BH, Q, E), (BH, K, E) and (BH, K, F)."""
    scores = query.new_empty(*query.shape[:2], key.shape[1])
    scores.requires_grad_(query.requires_grad or key.requires_grad)
    observe(_aten.bmm.default, (query, key.transpose(-2, -1)), scores)
    observe(_aten.bmm.default, (scores, value), query.new_empty(*query.shape[:2], value.shape[-1]))


class MetaAutocast(TorchFunctionMode):
    """While active, products are of bfloat16 and norms, sums and losses of float32, as under CUDA's autocast.

    Autocast itself does not support the meta device. Like it, this keeps one copy of a weight that trains, and makes a
    new copy of a frozen weight at every use.

    Args:
        on_copy: Called with every bfloat16 copy of a weight.
    """

    def __init__(self, on_copy: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.on_copy = on_copy
        self._copies: dict[Tensor, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _AUTOCAST_BF16:
            args, kwargs = map_tensors(self._to_bfloat16, (args, kwargs))
        elif func in _AUTOCAST_FP32:
            args, kwargs = map_tensors(lambda t: t.float() if t.dtype == torch.bfloat16 else t, (args, kwargs))
        return func(*args, **kwargs)

    def _to_bfloat16(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not isinstance(tensor, nn.Parameter):
            return tensor.bfloat16()
        copy = self._copies.get(tensor)
        if copy is None:
            copy = tensor.bfloat16()
            self.on_copy(copy)
            if tensor.requires_grad:
                self._copies[tensor] = copy
        return copy


_AUTOCAST_BF16 = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm),
}
_AUTOCAST_FP32 = {
    *(F.layer_norm, F.softmax, F.log_softmax, F.cross_entropy, torch.softmax, torch.log_softmax, torch.layer_norm),
    *(torch.pow, torch.rsqrt, torch.exp, torch.sum, torch.norm, torch.cumsum, torch.prod),
    *(Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.exp, Tensor.sum, Tensor.norm, Tensor.softmax),
    Tensor.log_softmax,
}


def placeholder_like(like: Tensor, sources: list[Tensor]) -> Tensor:
    """A tensor shaped like another one; depends on ``sources`` if that one requires a gradient, and saves nothing."""
    if not like.requires_grad:
        return torch.empty_like(like)
    made: Tensor = _Placeholder.apply(like.detach(), *sources)
    return made


def _interpolate(values: Tensor, size: Any = None, scale_factor: Any = None, *_: Any, **__: Any) -> Tensor:
    space = values.shape[2:]
    if size is None:
        factors = scale_factor if isinstance(scale_factor, tuple | list) else [scale_factor] * len(space)
        size = [int(length * factor) for length, factor in zip(space, factors, strict=True)]
    sizes = size if isinstance(size, tuple | list) else [size] * len(space)
    like = values.detach().new_empty(*values.shape[:2], *(int(length) for length in sizes))
    return placeholder_like(like.requires_grad_(values.requires_grad), [values])


class _MetaFunction(torch.autograd.Function):
    """Gradients without values, for inputs whose shapes and types are in ``ctx.inputs``."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return tuple(like and torch.empty(like[0], dtype=like[1], device=META) for like in ctx.inputs)


class _Placeholder(_MetaFunction):
    """The first tensor's shape, depending on the others."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *sources: Tensor) -> Tensor:
        ctx.inputs = [None, *((t.shape, t.dtype) for t in sources)]
        return torch.empty_like(like)


class _FusedAttention(_MetaFunction):
    """Shapes of fused attention: (B, H, Q, E), (B, H, K, E), (B, H, K, F) -> (B, H, Q, F)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Laid out as the kernels do: transposing it back to (B, Q, H, F) then costs no copy.
        rows, heads, length = query.shape[0], query.shape[-3], query.shape[-2]
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2) if query.ndim == 4 else None
        out = query.new_empty(*query.shape[:-1], value.shape[-1]) if out is None else out
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        ctx.inputs = [(t.shape, t.dtype) for t in (query, key, value)]
        return out


class _CpuAttention(_MetaFunction):
    """Shapes of attention that saves its weights: (T, H, E), (T, G, E), (T, G, F) -> (T, H, F)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: Sequence[Rows], out_dtype: torch.dtype
    ) -> Tensor:
        heads = query.shape[1]
        # In float32 whatever comes in. Weights stand here row by row, also of rows of equal length: their gradients
        # come when more of the block is gone than they take, so that they are not the largest tensor that backward
        # needs room for twice.
        sizes = [(len(query[r.queries]) // r.count, len(key[r.keys]) // r.count) for r in rows for _ in range(r.count)]
        weights = [query.new_empty(heads, *size, dtype=torch.float32) for size in sizes]
        folded = [torch.empty_like(each, dtype=torch.float32) for each in (query, key, value)]
        ctx.save_for_backward(*folded, *weights)
        ctx.inputs = [*((t.shape, t.dtype) for t in (query, key, value)), None, None]
        return query.new_empty(*query.shape[:2], value.shape[-1], dtype=out_dtype)
