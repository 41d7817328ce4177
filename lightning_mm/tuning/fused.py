"""How a rehearsed step computes what depends on the device: fused kernels, and types under bf16-mixed.

Data flow: functions that the model calls -> ``OneKernel``, ``ShortRows``, ``Bfloat16`` -> operations as a real device
would run them.

Shapes: B rows, L tokens after padding, T real tokens of all rows, H heads, G heads of keys, Q queries, K keys, E head
size, F size of a value.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lightning_mm.models.short_rows import Rows
from lightning_mm.tuning.rehearsal import Observe

_META = torch.device("meta")
_aten = torch.ops.aten


class OneKernel(TorchFunctionMode):
    """While active, what torch writes out in many operations on the meta device is one, as on a real device.

    These are fused attention, which would keep the weights of every pair for backward, and interpolation, which would
    take longer than a block.

    Args:
        observe: Sees the two products of attention, as if they were written out.
    """

    def __init__(self, observe: Observe | None = None) -> None:
        super().__init__()
        self.observe = observe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].device == _META:
            return self._attended(*args[:3])
        if func is F.interpolate and args[0].device == _META:
            return _interpolated(*args, **kwargs)
        return func(*args, **kwargs)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = _Fused.apply(query, key, value)
        if self.observe is not None:
            rows = query.shape[:-2]
            key_BHKE = key[..., :1, :, :].expand(*rows, *key.shape[-2:])
            value_BHKF = value[..., :1, :, :].expand(*rows, *value.shape[-2:])
            _products(self.observe, *(each.flatten(0, -3) for each in (query, key_BHKE, value_BHKF)))
        return out


class ShortRows:
    """Attention of short rows on a processor, as ``models.short_rows`` computes it: what it keeps, and its products.

    Args:
        observe: Sees the two products, as rows that are padded to equal length would need them.
        shape: B, L.
        bf16: Whether it gives bfloat16, as under autocast.
    """

    def __init__(self, observe: Observe, shape: tuple[int, int], bf16: bool) -> None:
        self.observe, self.shape, self.bf16 = observe, shape, bf16

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, rows: Sequence[Rows]) -> Tensor:
        out: Tensor = _Written.apply(query, key, value, rows, torch.bfloat16 if self.bf16 else query.dtype)
        apart = rows[0].queries != slice(None)  # side by side, and not all that there are
        count, length = self.shape if apart else (rows[0].count, len(query) // rows[0].count)
        keys = length if apart else len(key) // count
        heads, size = query.shape[1] * count, query.shape[2]
        padded = (query.new_empty(heads, length, size), query.new_empty(heads, keys, size))
        values = value.new_empty(heads, keys, value.shape[2])
        for made, like in zip((*padded, values), (query, key, value), strict=True):
            made.requires_grad_(like.requires_grad)
        _products(self.observe, *padded, values)
        return out


def _products(observe: Observe, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Show the two of (BH, Q, E), (BH, K, E) and (BH, K, F)."""
    scores = query.new_empty(*query.shape[:2], key.shape[1])
    scores.requires_grad_(query.requires_grad or key.requires_grad)
    observe(_aten.bmm.default, (query, key.transpose(-2, -1)), scores)
    observe(_aten.bmm.default, (scores, value), query.new_empty(*query.shape[:2], value.shape[-1]))


class StandIn(torch.autograd.Function):
    """A tensor of some shape that depends on others, and of which nothing is kept."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *needed: Tensor) -> Tensor:
        ctx.given = [(t.shape, t.dtype) for t in needed]
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *(torch.empty(shape, dtype=dtype, device=_META) for shape, dtype in ctx.given)


def stand_in(like: Tensor, needed: list[Tensor]) -> Tensor:
    """A tensor like another one, without a value; it hangs on ``needed`` if the other one needs a gradient."""
    if not like.requires_grad:
        return torch.empty_like(like)
    made: Tensor = StandIn.apply(like.detach(), *needed)
    return made


def _interpolated(values: Tensor, size: Any = None, scale_factor: Any = None, *_: Any, **__: Any) -> Tensor:
    space = values.shape[2:]
    if size is None:
        factors = scale_factor if isinstance(scale_factor, tuple | list) else [scale_factor] * len(space)
        size = [int(length * factor) for length, factor in zip(space, factors, strict=True)]
    sizes = size if isinstance(size, tuple | list) else [size] * len(space)
    like = values.detach().new_empty(*values.shape[:2], *(int(length) for length in sizes))
    return stand_in(like.requires_grad_(values.requires_grad), [values])


class Bfloat16(TorchFunctionMode):
    """While active, products are of bfloat16 and norms, sums and losses of float32, as under CUDA's autocast.

    Autocast itself knows no meta device. Like it, this keeps one copy of a weight that trains, and makes a new one of a
    frozen weight at every use.

    Args:
        copied: Is told of every copy of a weight.
    """

    def __init__(self, copied: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.copied = copied
        self._copies: dict[Tensor, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            args, kwargs = tree_map_only(Tensor, self._lower, (args, kwargs))
        elif func in _SUMS:
            args, kwargs = tree_map_only(Tensor, _raised, (args, kwargs))
        return func(*args, **kwargs)

    def _lower(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not isinstance(tensor, nn.Parameter):
            return tensor.bfloat16()
        copy = self._copies.get(tensor)
        if copy is None:
            copy = tensor.bfloat16()
            self.copied(copy)
            if tensor.requires_grad:
                self._copies[tensor] = copy
        return copy


_PRODUCTS = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm),
}
_SUMS = {
    *(F.layer_norm, F.softmax, F.log_softmax, F.cross_entropy, torch.softmax, torch.log_softmax, torch.layer_norm),
    *(torch.pow, torch.rsqrt, torch.exp, torch.sum, torch.norm, torch.cumsum, torch.prod),
    *(
        Tensor.pow,
        Tensor.__pow__,
        Tensor.rsqrt,
        Tensor.exp,
        Tensor.sum,
        Tensor.norm,
        Tensor.softmax,
        Tensor.log_softmax,
    ),
}


def _raised(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


class _Fused(torch.autograd.Function):
    """Shapes of fused attention: (B, H, Q, E), (B, H, K, E), (B, H, K, F) -> (B, H, Q, F)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Laid out as the kernels do: transposing it back to (B, Q, H, F) then costs no copy.
        rows, heads, length = query.shape[0], query.shape[-3], query.shape[-2]
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2) if query.ndim == 4 else None
        out = query.new_empty(*query.shape[:-1], value.shape[-1]) if out is None else out
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        ctx.given = [(t.shape, t.dtype) for t in (query, key, value)]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return tuple(torch.empty(shape, dtype=dtype, device=_META) for shape, dtype in ctx.given)


class _Written(torch.autograd.Function):
    """Shapes of attention that keeps its weights: (T, H, E), (T, G, E), (T, G, F) -> (T, H, F)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: Sequence[Rows], given: torch.dtype
    ) -> Tensor:
        heads = query.shape[1]
        # In float32 whatever comes in. Weights stand here row by row, also of rows of equal length: their gradients
        # come when more of the block is gone than they take, so that they are not the largest tensor that backward
        # needs room for twice.
        sizes = [(len(query[r.queries]) // r.count, len(key[r.keys]) // r.count) for r in rows for _ in range(r.count)]
        weights = [query.new_empty(heads, *size, dtype=torch.float32) for size in sizes]
        folded = [torch.empty_like(each, dtype=torch.float32) for each in (query, key, value)]
        ctx.save_for_backward(*folded, *weights)
        ctx.given = [(t.shape, t.dtype) for t in (query, key, value)]
        return query.new_empty(*query.shape[:2], value.shape[-1], dtype=given)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *(torch.empty(shape, dtype=dtype, device=_META) for shape, dtype in ctx.given), None, None
