"""The frozen prefix: everything below the lowest block that trains, run apart from the rest.

Data flow: Batch -> ``FrozenPrefix.states`` (tower, connector, embeddings and the blocks below, outside autograd) ->
what enters the lowest trainable block -> ``FrozenPrefix.entering``: the model from there on. In between the states can
be kept, since no training step changes them.

Both halves are the model's own forward pass with some blocks passed by, so that positions, masks and what stands
behind the blocks are the family's own.

Shapes: B rows, L tokens, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.core.errors import UserError, first_line
from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import gathered_before, supervised_nll
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import skipped, uncompiled

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
_COARSE = 2e-2
"""Relative, of the summed loss: in 16 bits what is added between blocks is rounded at other places."""


class FrozenPrefix:
    """A model split at the entrance of one decoder block.

    Args:
        model: The plain model.
        layout: Of it.
        first: The block that the rest begins with.
    """

    def __init__(self, mm: MultimodalModel, first: int) -> None:
        self.mm, self.first = mm, first
        self._blocks = [mm.model.get_submodule(name) for name in mm.layout.layers]
        self._in_tuples = False

    def __str__(self) -> str:
        return f"what enters block {self.first}"

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """(B, L, D) what enters the block; needs all inputs of the batch, pictures too."""
        head = self.mm.model.get_submodule(self.mm.layout.head)
        with (
            uncompiled(self.mm.model),
            skipped(self._blocks[self.first :], self._in_tuples),
            self.listening() as held,
            gathered_before(head, batch.supervised[:0]),
        ):
            self.mm.model(**batch.inputs, use_cache=False)
        # A weight that was cast here without a graph must not be found by what trains.
        torch.clear_autocast_cache()
        return held[0]

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """While active, what enters the block in each run of the whole model is listed."""
        held: list[Tensor] = []

        def hold(hidden: Tensor) -> Tensor:
            held.append(hidden)
            return hidden

        with _hooked(self._blocks[self.first], hold):
            yield held

    @contextmanager
    def entering(self, states: Tensor) -> Iterator[None]:
        """While active, the model begins at the block, with these states (B, L, D) whatever it is given."""
        with (
            skipped(self._blocks[: self.first], self._in_tuples),
            _hooked(self._blocks[self.first], lambda hidden: states.to(hidden.dtype)),
        ):
            yield

    @torch.no_grad()
    def verify(self, batch: Batch, rest: Batch) -> None:
        """Compare the halves, one after the other, with the whole model; nothing is left changed.

        Args:
            batch: Rows with their pictures.
            rest: The same rows without.

        Raises:
            UserError: They are not the same, or the rest cannot do without the pictures.
        """
        head = self.mm.model.get_submodule(self.mm.layout.head)
        with untouched(self.mm.model, batch.regions.device):
            try:
                with outputs_of(self._blocks[-1]) as outputs:
                    whole = supervised_nll(self.mm.model, head, batch).nll
                self._in_tuples = isinstance(outputs[0], tuple)
                states = self.states(batch)
                with self.entering(states):
                    halves = supervised_nll(self.mm.model, head, rest).nll
            except RUN_ERRORS as error:
                why = f"above block {self.first} the model needs more than its stream: {first_line(error)}"
                raise _refusal(why) from error
        gap = gap_between(whole, halves, states.dtype)
        if gap:
            raise _refusal(f"the loss of one batch differs by {gap:.2g} of itself when block {self.first} is begun at")


RUN_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
"""What a model's own code raises where it is not given all that it needs."""


def gap_between(whole: Tensor, halves: Tensor, dtype: torch.dtype) -> float:
    """How far a summed loss is off, relative; 0 where that can be the order of sums in ``dtype``."""
    tolerance = _TOLERANCE.get(dtype if whole.dtype == dtype else torch.bfloat16, _COARSE)
    gap = float((whole - halves).abs() / whole.abs().clamp_min(1e-6))
    return 0.0 if gap <= tolerance else gap


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """While active, the model is in eval mode and as transformers wrote it; nothing is left changed."""
    training = [module for module in model.modules() if module.training]
    with own_randomness(device), uncompiled(model):
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def own_randomness(device: torch.device) -> AbstractContextManager[None]:
    """While active, what is drawn leaves no trace in the generators of the host and of this device."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def _hooked(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While active, ``change`` says what enters the block."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def outputs_of(block: nn.Module) -> Iterator[list[Any]]:
    """While active, what the block returns is listed."""
    outputs: list[Any] = []
    handle = block.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _refusal(why: str) -> UserError:
    return UserError("The frozen prefix cannot be run apart.", why[0].upper() + why[1:] + ".", "--model.cache.mode off")
