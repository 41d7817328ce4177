"""The frozen prefix: everything below the lowest block that trains, run separately from the rest of the model.

Data flow: Batch -> ``FrozenPrefix.states`` (tower, connector, embeddings and the blocks below, outside autograd) ->
input of the lowest trainable block -> ``FrozenPrefix.starting_from``: the model from that block on. In between the
states can be cached, since no training step changes them.

Both halves are the model's own forward pass with some blocks skipped, so that positions, masks and everything after
the blocks are computed by the model's own code.

Shapes: B rows, L tokens, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.core.errors import UserError, first_line
from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import select_positions_before_head, supervised_nll
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import skipped, uncompiled

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
_COARSE = 2e-2
"""Relative tolerance of the summed loss in 16 bits, where sums between blocks are rounded at other places."""


class FrozenPrefix:
    """A model split before one decoder block.

    Args:
        mm: The plain model.
        first: Index of the first block above the split.
    """

    def __init__(self, mm: MultimodalModel, first: int) -> None:
        self.mm, self.first = mm, first
        self._blocks = [mm.model.get_submodule(name) for name in mm.layout.layers]
        self._in_tuples = False

    def __str__(self) -> str:
        return f"what enters block {self.first}"

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """Input (B, L, D) of the block; needs all inputs of the batch, images included."""
        head = self.mm.model.get_submodule(self.mm.layout.head)
        with (
            uncompiled(self.mm.model),
            skipped(self._blocks[self.first :], self._in_tuples),
            self.record_inputs() as held,
            select_positions_before_head(head, batch.supervised[:0]),
        ):
            self.mm.model(**batch.inputs, use_cache=False)
        # Autocast must not reuse in training a weight that was cast here without a graph.
        torch.clear_autocast_cache()
        return held[0]

    @contextmanager
    def record_inputs(self) -> Iterator[list[Tensor]]:
        """While active, the block's input (B, L, D) is appended to the list in each forward pass of the model."""
        held: list[Tensor] = []

        def hold(hidden: Tensor) -> Tensor:
            held.append(hidden)
            return hidden

        with _replace_block_input(self._blocks[self.first], hold):
            yield held

    @contextmanager
    def starting_from(self, states: Tensor) -> Iterator[None]:
        """While active, a forward pass of the model starts at the block, with these states (B, L, D) as its input."""
        with (
            skipped(self._blocks[: self.first], self._in_tuples),
            _replace_block_input(self._blocks[self.first], lambda hidden: states.to(hidden.dtype)),
        ):
            yield

    @torch.no_grad()
    def verify(self, batch: Batch, rest: Batch) -> None:
        """Compare the loss of the two halves with that of the whole model; the model is left unchanged.

        Args:
            batch: Rows with their images.
            rest: The same rows without images.

        Raises:
            UserError: The losses differ, or the upper half needs the images.
        """
        head = self.mm.model.get_submodule(self.mm.layout.head)
        with temporary_eval_mode(self.mm.model, batch.regions.device):
            try:
                with record_outputs(self._blocks[-1]) as outputs:
                    whole = supervised_nll(self.mm.model, head, batch).nll
                self._in_tuples = isinstance(outputs[0], tuple)
                states = self.states(batch)
                with self.starting_from(states):
                    halves = supervised_nll(self.mm.model, head, rest).nll
            except FORWARD_ERRORS as error:
                why = f"above block {self.first} the model needs more than its stream: {first_line(error)}"
                raise _refusal(why) from error
        gap = relative_loss_gap(whole, halves, states.dtype)
        if gap:
            raise _refusal(f"the loss of one batch differs by {gap:.2g} of itself when block {self.first} is begun at")


FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
"""Exceptions that a model's forward raises if an input is missing."""


def relative_loss_gap(whole: Tensor, halves: Tensor, dtype: torch.dtype) -> float:
    """Relative difference of two summed losses; 0 if the order of summation in ``dtype`` can explain it.

    Args:
        whole: () loss of the whole model.
        halves: () loss of the split model.
        dtype: dtype of the hidden states at the split.
    """
    tolerance = _TOLERANCE.get(dtype if whole.dtype == dtype else torch.bfloat16, _COARSE)
    gap = float((whole - halves).abs() / whole.abs().clamp_min(1e-6))
    return 0.0 if gap <= tolerance else gap


@contextmanager
def temporary_eval_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """While active, the model is in eval mode and uncompiled; modes and random state are restored afterwards."""
    training = [module for module in model.modules() if module.training]
    with fork_rng(device), uncompiled(model):
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """While active, random draws do not advance the generators of the host and of this device."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def _replace_block_input(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While active, the block's input (B, L, D) is replaced by what ``change`` returns for it."""

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
def record_outputs(block: nn.Module) -> Iterator[list[Any]]:
    """While active, the block's outputs are appended to the list."""
    outputs: list[Any] = []
    handle = block.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _refusal(why: str) -> UserError:
    return UserError("The frozen prefix cannot be run apart.", why[0].upper() + why[1:] + ".", "--model.cache.mode off")
