"""A model's step without its weights: what depends on weights has a shape only, everything else is computed.

Data flow: model or config -> ``skeleton_of`` (meta device) -> under ``Rehearsal`` the model's own forward pass on a
real batch. Token ids, masks, picture grids and pixels stay on the CPU with their values, so that models may branch on
them; the first operation that meets a weight leaves shapes behind.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
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
