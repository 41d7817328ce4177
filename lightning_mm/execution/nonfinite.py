"""Where NaN or infinity comes from in a batch: run again, with a look at every module's output and every gradient.

Data flow: model + loss of a batch -> forward pass under hooks -> the first module whose output is not finite while its
inputs are; else the loss; else backward -> the first gradient that is not finite, from the top.

Shapes: B rows, L tokens, S supervised positions of the batch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import LossOutput
from lightning_mm.models.finite_weights import is_finite
from lightning_mm.models.hooks import uncompiled


@dataclass(frozen=True)
class NonFiniteSource:
    """Where the first value that is not finite appears in a batch.

    Args:
        what: It in words.
        name: Of the module or parameter; '' where it is the loss.
        rows: Rows of the batch whose own loss is not finite; empty where every row's is.
    """

    what: str
    name: str
    rows: tuple[int, ...] = ()


def find_nonfinite(
    model: nn.Module, batch: Batch, objective: Callable[[Batch], LossOutput], trainable: Mapping[str, nn.Parameter]
) -> NonFiniteSource | None:
    """The source of NaN or infinity in a batch; None where loss and gradients are finite.

    Gradients are computed beside ``.grad``, which is left alone, and reach no hook of DDP.

    Args:
        model: The model, in the modes of the step.
        batch: On the model's device.
        objective: Computes its loss with the model.
        trainable: Parameters whose gradients are looked at, in the model's order.
    """
    with torch.enable_grad(), _first_output(model) as first:
        loss = objective(batch)
    rows = _rows_at_fault(batch, loss)
    output = "".join(f"the output of {name} ({type(module).__name__}){_own_fault(module)}" for name, module in first)
    if first and not is_finite(loss.nll):
        return NonFiniteSource(output, first[0][0], rows)
    if not is_finite(loss.nll):
        return NonFiniteSource("the loss itself: every module's output is finite", "", rows)
    if not loss.nll.requires_grad:  # no parameter that trains is in the graph
        return None
    gradients = torch.autograd.grad(loss.nll, list(trainable.values()), allow_unused=True)
    for name, gradient in reversed(list(zip(trainable, gradients, strict=True))):
        if gradient is not None and not is_finite(gradient):
            before = f"the loss is finite, {output} is not" if first else "outputs and loss are finite"
            return NonFiniteSource(f"the gradient of {name}: {before}", name)
    return None


@contextmanager
def _first_output(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """While active, the first module whose output is not finite while its inputs are is put into the list.

    Modules end their forward before those that hold them. Where a value is spoiled between two modules (in a sum, say),
    all that follow get it as an input, and the module around them is the one.
    """
    found: list[tuple[str, nn.Module]] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            if found or all(map(is_finite, _tensors(output))):
                return
            # What a mask adds to scores may well be infinite.
            given = [args, *(value for key, value in kwargs.items() if "mask" not in key)]
            if all(map(is_finite, _tensors(given))):
                found.append((name or "the whole model", module))

        return hook

    handles = []
    try:
        with uncompiled(model):
            for name, module in model.named_modules():
                handles.append(module.register_forward_hook(look(name), with_kwargs=True))
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers; what other objects hold, such as caches of keys, is left out."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _own_fault(module: nn.Module) -> str:
    bad = [name for name, parameter in module.named_parameters(recurse=False) if not is_finite(parameter)]
    return f", whose {' and '.join(bad)} {'is' if len(bad) == 1 else 'are'} not finite" if bad else ""


def _rows_at_fault(batch: Batch, loss: LossOutput) -> tuple[int, ...]:
    """Rows with a supervised token whose loss is not finite."""
    rows_S = batch.supervised // batch.regions.shape[1]
    return tuple(rows_S[~loss.token_nll.isfinite()].unique().tolist())
