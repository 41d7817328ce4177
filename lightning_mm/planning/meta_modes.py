"""How a rehearsed step computes what depends on the device: fused kernels, and types under bf16-mixed.

Data flow: functions that the model calls -> ``OneKernel``, ``ShortRows``, ``Bfloat16`` -> operations as a real device
would run them.

Shapes: B rows, L tokens after padding, T real tokens of all rows, H heads, G heads of keys, Q queries, K keys, E head
size, F size of a value.

A model's step without its weights: what depends on weights has a shape only, everything else is computed.

Data flow: model or config -> ``skeleton_of`` (meta device) -> under ``Rehearsal`` the model's own forward pass on a
real batch. Token ids, masks, picture grids and pixels stay on the CPU with their values, so that models may branch on
them; the first operation that meets a weight leaves shapes behind.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_mm.core.errors import UserError
from lightning_mm.models.attention.cpu_kernels import Rows

_CPU = torch.device("cpu")
Observe = Callable[[Any, tuple[Any, ...], Any], None]
"""Called with an operation, its arguments and its result."""


class Rehearsal(TorchDispatchMode):
    """While active, operations on weights yield shapes, and all others yield values.

    Args:
        observe: Sees every operation on shapes.
    """

    def __init__(self, observe: Observe | None = None) -> None:
        super().__init__()
        self.observe = observe

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if not any(t.device == _META for t in tensors):
            return func(*args, **_known(func, kwargs, bool(tensors)))
        if any(t.device != _META for t in tensors):
            if func is _aten.index.Tensor or func is _aten.index_put.default or func is _aten.index_put_.default:
                args = (args[0], _positions(args[1]), *args[2:])
            if func is _aten.masked_select.default and args[1].device != _META:
                return args[0].new_empty(int(args[1].expand(args[0].shape).sum()))
            args, kwargs = tree_map_only(Tensor, _shape_only, (args, kwargs))
        if kwargs.get("device") is not None:  # what is unknown cannot be brought to another device
            kwargs = {**kwargs, "device": _META}
        # Of the experts' grouped products, the meta device knows those of bfloat16 only.
        grouped = getattr(func, "overloadpacket", None) is _aten._grouped_mm and args[1].ndim == 3
        result = args[0].new_empty(len(args[0]), args[1].shape[-1]) if grouped else func(*args, **kwargs)
        if self.observe is not None:
            self.observe(func, args, result)
        return result


def skeleton_of(model: Any) -> nn.Module:
    """The same architecture as a loaded model, without weights, adapters and quantisation."""
    config = copy.deepcopy(model.config)
    with without_weights():
        bare: Any = type(model)(config)
        bare.tie_weights()
    return ready(bare)


def ready(skeleton: Any) -> nn.Module:
    """A skeleton that can be rehearsed: kernels that need a device of their own are exchanged for like ones."""
    if getattr(skeleton.config, "_attn_implementation", None) != "eager":
        skeleton.set_attn_implementation("sdpa" if getattr(skeleton, "_supports_sdpa", False) else "eager")
    bare: nn.Module = skeleton.eval()
    return bare


@contextmanager
def without_weights() -> Iterator[None]:
    """While active, new modules and adapters have shapes only."""
    with torch.random.fork_rng(devices=[]), Rehearsal(), _META:
        yield


def refused(model: nn.Module, error: Exception) -> UserError:
    """What to tell a user whose model cannot be rehearsed."""
    first = (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
    return UserError(
        f"The step of {type(model).__name__} cannot be counted without its weights.",
        f"It branches on values that depend on them: {first}",
        "Measure it instead: run fit for a few steps and read the throughput.",
    )


def _known(func: Any, kwargs: dict[str, Any], computed: bool) -> dict[str, Any]:
    """What is not made of weights stays on the CPU: copies of known tensors, and new ids and masks."""
    device = kwargs.get("device")
    if device is None or torch.device(device) != _META:
        return kwargs
    dtype = kwargs.get("dtype")
    counted = func in (_aten.arange.default, _aten.arange.start, _aten.arange.start_step)
    if computed or (dtype is not None and not dtype.is_floating_point) or (counted and dtype is None):
        return {**kwargs, "device": _CPU}
    return kwargs


def _positions(indices: Any) -> list[Tensor | None]:
    """Known masks as the positions that they select; other indices as they are."""
    found: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool and index.device != _META:
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


def _shape_only(tensor: Tensor) -> Tensor:
    if tensor.device == _META:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)


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
