"""A model's step without its weights: what depends on weights has a shape only, everything else is computed.

Data flow: model or config -> ``skeleton_of`` (meta device) -> under ``Rehearsal`` the model's own forward pass on a
real batch. Token ids, masks, picture grids and pixels stay on the CPU with their values, so that models may branch on
them; the first operation that meets a weight leaves shapes behind.

Shapes: B rows, H heads, Q queries, K keys, E head size, F size of a value.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_mm.errors import UserError

_META = torch.device("meta")
_CPU = torch.device("cpu")
_aten = torch.ops.aten
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
        result = func(*args, **kwargs)
        if self.observe is not None:
            self.observe(func, args, result)
        return result


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
            key_BHEK = key[..., :1, :, :].expand(*rows, *key.shape[-2:]).transpose(-2, -1).flatten(0, -3)
            value_BHKF = value[..., :1, :, :].expand(*rows, *value.shape[-2:]).flatten(0, -3)
            scores = query.new_empty(key_BHEK.shape[0], query.shape[-2], key.shape[-2])
            scores.requires_grad_(query.requires_grad or key.requires_grad)
            self.observe(_aten.bmm.default, (query.flatten(0, -3), key_BHEK), scores)
            self.observe(_aten.bmm.default, (scores, value_BHKF), out.flatten(0, -3))
        return out


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
    """

    def __init__(self) -> None:
        super().__init__()
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
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.bfloat16()
        if tensor not in self._copies:
            self._copies[tensor] = tensor.bfloat16()
        return self._copies[tensor]


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
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


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
