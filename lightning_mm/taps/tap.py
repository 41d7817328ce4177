"""Hooks on the decoder's blocks of a live module, for the length of one forward pass.

Data flow: decoder blocks -> ``tapped`` -> ``receive(slice, hidden states)``. Slice 0 is what enters the first block
(the embeddings, pictures put in); slice i + 1 is what block i returns, before the final norm.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.models.anatomy import Anatomy

Receive = Callable[[int, Tensor], None]


def plain(model: Any) -> nn.Module:
    """The transformers model inside what others have wrapped around it: torch.compile, DDP, PEFT."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        else:
            assert isinstance(model, nn.Module)
            return model


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """While active, modules that were compiled run uncompiled: a compiled one may not notice new hooks."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, implementation in compiled.items():
            module._compiled_call_impl = implementation


@contextmanager
def tapped(
    model: nn.Module, anatomy: Anatomy, receive: Receive, slices: Collection[int] | None = None
) -> Iterator[None]:
    """While active, every forward pass of the model hands over its hidden states.

    Blocks that were compiled run uncompiled meanwhile. No hook is left behind, also where the forward pass fails.

    Args:
        model: As ``plain`` gives it.
        anatomy: Of that model.
        receive: Called with the slice and its hidden states (B, L, D), once per forward pass and slice.
        slices: Which of the ``num_layers + 1`` slices; all if None.
    """
    wanted = set(range(anatomy.num_layers + 1) if slices is None else slices)
    handles = []
    try:
        with uncompiled(model):
            for index, name in enumerate(anatomy.layers):
                block = model.get_submodule(name)
                if index == 0 and 0 in wanted:
                    handles.append(block.register_forward_pre_hook(_entering(receive), with_kwargs=True))
                if index + 1 in wanted:
                    handles.append(block.register_forward_hook(_leaving(receive, index + 1)))
            yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(receive: Receive) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        receive(0, args[0] if args else kwargs["hidden_states"])

    return hook


def _leaving(receive: Receive, index: int) -> Callable[..., None]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        receive(index, output if isinstance(output, Tensor) else output[0])

    return hook
