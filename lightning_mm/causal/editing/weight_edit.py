"""Reversible changes of one weight: the closed-form low-rank update, and the old tensor kept to undo it.

Data flow: keys and the missing output at each -> ``closed_form_update`` -> ``WeightEdit`` -> ``apply_edits``: the model
runs with it.

Shapes: D hidden size, F inner size of the MLP, N edits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.core.errors import UserError


def closed_form_update(keys_FN: Tensor, gaps_DN: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Rank-N change of W that maps N keys to their values at once: (V - W K)(K^T K + lambda I)^-1 K^T.

    It minimizes |W' K - V|^2 + lambda |W' - W|^2 over W'. For one key, the remaining error of W' k is
    lambda / (lambda + |k|^2) of that of W k.

    Args:
        keys_FN: K, one key per column.
        gaps_DN: V - W K, the missing output at each key.
        ridge: lambda, the ridge penalty.

    Returns:
        Left (D, N) and right (N, F) factors of the change, solved in float64.
    """
    keys = keys_FN.double()
    gram_NN = keys.T @ keys + ridge * torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device)
    return gaps_DN.double(), torch.linalg.solve(gram_NN, keys.T)


@dataclass(eq=False)
class WeightEdit:
    """A reversible change of one layer's down projection.

    While it is applied, the old weight is kept as well: one more D x F matrix in the model's own dtype.

    Args:
        layer: Index of the decoder block.
        module: Name of the module; adapters on it are unchanged, the weight below them is edited.
        left: (D, N) left factor, or the whole change (D, F).
        right: (N, F) right factor; None: ``left`` is the whole change.
        keys: (F, N) keys that the edit changes the output at; None: not known.
        gaps: (D, N) wanted change of the output at each key; None: not known.
        rounding: Relative error of the stored change, from rounding to the weight's dtype; set by ``apply``.
        misses: |W' k - v| / |W k - v| for each key with the weight as stored; set by ``apply``.
    """

    layer: int
    module: str
    left: Tensor
    right: Tensor | None = None
    keys: Tensor | None = None
    gaps: Tensor | None = None
    rounding: float = 0.0
    misses: tuple[float, ...] = ()
    _held: tuple[Any, Tensor, Tensor] | None = field(default=None, repr=False)

    def change(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(D, F) change of the weight."""
        return self.left.to(dtype) if self.right is None else self.left.to(dtype) @ self.right.to(dtype)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Apply the change, computed in float32 or wider and stored in the weight's own dtype.

        Raises:
            UserError: The module's weight cannot be edited.
        """
        assert self._held is None, "an edit is applied once"
        weight: Any = down_projection(model, self.module, self.layer).weight
        old, wide = weight.data, torch.promote_types(weight.dtype, torch.float32)
        change = self.change(wide).to(weight.device)
        new = (old.to(wide) + change).to(old.dtype)
        stored = new.to(wide) - old.to(wide)
        self.rounding = float((stored - change).norm() / change.norm().clamp_min(1e-30))
        if self.keys is not None and self.gaps is not None:
            keys, gaps = self.keys.to(stored), self.gaps.to(stored)
            missed = (stored @ keys - gaps).norm(dim=0) / gaps.norm(dim=0).clamp_min(1e-30)
            self.misses = tuple(missed.tolist())
        weight.data = new
        self._held = (weight, old, new)

    def undo(self) -> None:
        """Restore the old tensor bit by bit; edits of one weight are undone in reverse order."""
        assert self._held is not None, "the edit is not applied"
        weight, old, new = self._held
        assert weight.data_ptr() == new.data_ptr(), "a later edit of the same weight is still applied"
        weight.data, self._held = old, None


@contextmanager
def apply_edits(model: nn.Module, edits: Sequence[WeightEdit]) -> Iterator[None]:
    """Context in which the model has the edits; afterwards its weights are the original tensors.

    Args:
        model: The unwrapped model.
        edits: Edits of any layers, applied in order.

    Raises:
        UserError: A layer cannot be edited; no edit is applied then.
    """
    done: list[WeightEdit] = []
    try:
        for edit in edits:
            edit.apply(model)
            done.append(edit)
        yield
    finally:
        for edit in reversed(done):
            edit.undo()


def down_projection(model: nn.Module, name: str | None, layer: int) -> nn.Linear:
    """The linear module whose weight is edited, below any adapter.

    Raises:
        UserError: The layer has none, its weight is quantized, or an adapter depends on the weight (DoRA).
    """
    if name is None:
        raise UserError(
            f"Layer {layer} cannot be edited.",
            "Its feed-forward part does not end in one linear module (a mixture of experts, say), or there is none.",
            "Name another layer.",
        )
    module: Any = model.get_submodule(name)
    if any(dict(getattr(module, "use_dora", {})).values()):
        raise UserError(
            f"Layer {layer} cannot be edited.",
            "DoRA scales its weight by the weight's own norm, so a change of it is not a change of the output.",
            "Export the run first, which merges the adapters, and edit the exported folder.",
        )
    while hasattr(module, "base_layer"):
        module = module.base_layer
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise UserError(
            f"Layer {layer} cannot be edited.",
            f"Its weights are held in a {type(module).__name__} module, quantised or of another kind.",
            "Load the model unquantised, or name a layer that is.",
        )
    return module
