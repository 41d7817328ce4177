"""The frozen prefix: everything below the lowest block that trains, run separately from the rest of the model.

Data flow: Batch -> ``FrozenPrefix.states`` (tower, connector, embeddings and the blocks below, outside autograd) ->
input of the lowest trainable block -> ``FrozenPrefix.starting_from``: the model from that block on. In between the
states can be cached, since no training step changes them.

Both halves are the model's own forward pass with some blocks skipped, so that positions, masks and everything after
the blocks are computed by the model's own code.

Shapes: B rows, L tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.core.errors import UserError, first_line
from lightning_mm.data.batch import Batch
from lightning_mm.execution.cache.proof import (
    FORWARD_ERRORS,
    decoder_states,
    differs,
    poisoned,
    poisoned_output,
    relative_gap,
    rounding_bound,
    structure_gap,
)
from lightning_mm.execution.loss import select_positions_before_head
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import skipped, uncompiled


class FrozenPrefix:
    """A model split before one decoder block.

    Args:
        mm: The plain model.
        first: Index of the first block above the split.

    ``width`` and ``dtype`` of the block's input are known once the split is verified.
    """

    def __init__(self, mm: MultimodalModel, first: int) -> None:
        self.mm, self.first = mm, first
        self._blocks = [mm.model.get_submodule(name) for name in mm.layout.layers]
        self._in_tuples = False
        self.width, self.dtype = 0, torch.float32

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

    def record_inputs(self) -> AbstractContextManager[list[Tensor]]:
        """While active, the block's input (B, L, D) is appended to the list in each forward pass of the model."""
        return record_inputs(self._blocks[self.first])

    @contextmanager
    def starting_from(self, states: Tensor) -> Iterator[None]:
        """While active, a forward pass of the model starts at the block, with these states (B, L, D) as its input."""
        with skipped(self._blocks[: self.first], self._in_tuples), self._beginning_with(states):
            yield

    def _beginning_with(self, states: Tensor) -> AbstractContextManager[None]:
        return _replace_block_input(self._blocks[self.first], lambda hidden: states.to(hidden.dtype))

    @torch.no_grad()
    def verify(self, batch: Batch, rows: Sequence[Batch], rest: Batch) -> None:
        """Prove that the two halves compute what the whole model does; the model is left unchanged.

        With the block's own input put back, embeddings and lower blocks giving NaN, the last block's output must be the
        same; and the input of each row computed alone must be that of the row in the batch, up to rounding.

        Args:
            batch: Rows with their images.
            rows: One batch per row, with its images.
            rest: The same rows without images.

        Raises:
            UserError: They do not, or the upper half needs the images.
        """
        device, top = batch.regions.device, (self.mm.layout.num_layers,)
        embedding = self.mm.transformers.get_input_embeddings()
        with temporary_eval_mode(self.mm.model, device):
            try:
                with record_outputs(self._blocks[-1]) as outputs, self.record_inputs() as held:
                    whole = decoder_states(self.mm, batch, top)
                again = decoder_states(self.mm, batch, top)
                self._in_tuples = isinstance(outputs[0], tuple)
                with (
                    poisoned_output(embedding),
                    poisoned(self._blocks[: self.first], self._in_tuples),
                    self._beginning_with(held[0]),
                ):
                    halves = decoder_states(self.mm, rest, top)
                alone = [self.states(row)[0] for row in rows]
            except FORWARD_ERRORS as error:
                why = f"above block {self.first} the model needs more than its stream: {first_line(error)}"
                raise _refusal(why) from error
        if gap := structure_gap(whole, again, halves):
            raise _refusal(
                f"what leaves the last block {differs(gap)} when block {self.first} is begun at: something above reads "
                "more than that block's input"
            )
        self.width, self.dtype = held[0].shape[-1], held[0].dtype
        depth = self.first + len(self.mm.layout.vision_blocks)
        bound = rounding_bound(self.dtype, device.type, self.width, max(depth, 1))
        gap = max(relative_gap(held[0][b, : len(row)], row) for b, row in enumerate(alone))
        if not gap <= bound:
            raise _refusal(f"what enters block {self.first} differs by {gap:.2g} if a row is computed alone")


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
def record_inputs(block: nn.Module) -> Iterator[list[Tensor]]:
    """While active, the hidden states that the block gets are appended to the list."""
    held: list[Tensor] = []

    def hold(hidden: Tensor) -> Tensor:
        held.append(hidden)
        return hidden

    with _replace_block_input(block, hold):
        yield held


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
