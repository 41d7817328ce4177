"""A model's forward pass on the meta device: what depends on weights has a shape only, everything else has values.

Data flow: model or config -> ``skeleton_of`` (weights on the meta device) -> the model's own forward pass on a real
batch under ``MetaWeightsMode``. Token ids, masks, picture grids and pixels stay on the CPU with their values, so that
models may branch on them; the first operation that meets a weight leaves shapes behind.

``FakeTensorMode`` does not serve here: its tensors have no values at all, and every family branches on the values of
masks or picture grids.

What this room takes from torch beside its documented interface stands here and in the two sets of
``meta_kernels.MetaAutocast``: the dispatch and pytree modules, and ``aten._grouped_mm``, whose float32 shape the meta
device does not know. ``tests/planning/test_torch_internals.py`` says which of them a release of torch has changed.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_mm.core.errors import UserError

CPU, META = torch.device("cpu"), torch.device("meta")
GROUPED_MM = torch.ops.aten._grouped_mm
"""The products of a mixture's experts, each with its own rows."""

_aten = torch.ops.aten

OpObserver = Callable[[Any, tuple[Any, ...], Any], None]
"""Called with an operation, its arguments and its result."""


class MetaWeightsMode(TorchDispatchMode):
    """While active, operations on weights yield shapes, and all others yield values.

    Args:
        observe: Sees every operation on shapes; None for nothing.
    """

    def __init__(self, observe: OpObserver | None = None) -> None:
        super().__init__()
        self.observe = observe

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs))
        if not any(t.device == META for t in tensors):
            return func(*args, **_keep_values_on_cpu(func, kwargs, bool(tensors)))
        if any(t.device != META for t in tensors):
            if func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
                args = (args[0], _masks_to_indices(args[1]), *args[2:])
            if func is _aten.masked_select.default and args[1].device != META:
                return args[0].new_empty(int(args[1].expand(args[0].shape).sum()))
            args, kwargs = map_tensors(_to_meta, (args, kwargs))
        if kwargs.get("device") is not None:  # a tensor without values cannot move to another device
            kwargs = {**kwargs, "device": META}
        # The meta device knows the grouped product of bfloat16 only.
        grouped = getattr(func, "overloadpacket", None) is GROUPED_MM and args[1].ndim == 3
        result = args[0].new_empty(len(args[0]), args[1].shape[-1]) if grouped else func(*args, **kwargs)
        if self.observe is not None:
            self.observe(func, args, result)
        return result


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, dicts and model outputs."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def map_tensors(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Nested tuples, lists, dicts and model outputs with every tensor changed."""
    return tree_map_only(Tensor, change, tree)


def skeleton_of(model: Any) -> nn.Module:
    """A loaded model's architecture on the meta device, without adapters and quantization."""
    config = copy.deepcopy(model.config)
    with meta_weights():
        skeleton: Any = type(model)(config)
        skeleton.tie_weights()
    return make_traceable(skeleton)


def make_traceable(skeleton: Any) -> nn.Module:
    """The skeleton in eval mode, with attention that needs no device of its own: SDPA, or eager in parts without it."""
    if getattr(skeleton.config, "_attn_implementation", None) != "eager":
        skeleton.set_attn_implementation(_kernels_of_parts(skeleton))
    plain: nn.Module = skeleton.eval()
    return plain


def _kernels_of_parts(skeleton: Any) -> dict[str, str]:
    """Kernel of the model itself (''), and of each part by the name of its config, as transformers loads them."""
    models = [module for module in skeleton.modules() if hasattr(module, "_supports_sdpa")]
    without = {id(model.config) for model in models if not model._supports_sdpa}
    parts = {name: getattr(skeleton.config, name) for name in skeleton.config.sub_configs}
    configs = {"": skeleton.config, **{name: part for name, part in parts.items() if part is not None}}
    return {name: "eager" if id(config) in without else "sdpa" for name, config in configs.items()}


@contextmanager
def meta_weights() -> Iterator[None]:
    """While active, new modules and adapters are on the meta device; the random generator stays as it is."""
    with torch.random.fork_rng(devices=[]), MetaWeightsMode(), META:
        yield


def untraceable(model: nn.Module, error: Exception) -> UserError:
    """The error of a model whose forward pass cannot run without weights."""
    first = (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
    return UserError(
        f"The step of {type(model).__name__} cannot be counted without its weights.",
        f"It branches on values that depend on them: {first}",
        "Measure it instead: run fit for a few steps and read the throughput.",
    )


def _keep_values_on_cpu(func: Any, kwargs: dict[str, Any], computed: bool) -> dict[str, Any]:
    """Arguments with the CPU for the meta device, for copies of tensors with values and for new ids and masks.

    Args:
        func: The operation.
        kwargs: Its keyword arguments.
        computed: Whether it is given tensors.
    """
    device = kwargs.get("device")
    if device is None or torch.device(device) != META:
        return kwargs
    dtype = kwargs.get("dtype")
    is_range = func in (_aten.arange.default, _aten.arange.start, _aten.arange.start_step)
    if computed or (dtype is not None and not dtype.is_floating_point) or (is_range and dtype is None):
        return {**kwargs, "device": CPU}
    return kwargs


def _masks_to_indices(indices: Any) -> list[Tensor | None]:
    """Boolean masks with values as the positions they select; other indices as they are."""
    found: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool and index.device != META:
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


def _to_meta(tensor: Tensor) -> Tensor:
    if tensor.device == META:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
