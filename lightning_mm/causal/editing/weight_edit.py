"""Changes of one weight that can be put in and taken out: the closed form, and the old tensor kept.

Data flow: keys and what is missing at each -> ``low_rank`` -> ``Edit`` -> ``edited``: the model computes with it.

Shapes: D hidden size, F inner size of the MLP, N edits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.core.errors import UserError


def low_rank(keys_FN: Tensor, gaps_DN: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The change of W that serves N keys at once: (V - W K)(K^T K + lambda I)^-1 K^T, of rank N.

    It minimises |W' K - V|^2 + lambda |W' - W|^2 over W'. For one key, W' k misses v by lambda / (lambda + |k|^2) of
    what W k missed.

    Args:
        keys_FN: K.
        gaps_DN: V - W K, what is missing at each key.
        ridge: lambda.

    Returns:
        Left (D, N) and right (N, F), whose product is the change; solved in float64.
    """
    keys = keys_FN.double()
    gram_NN = keys.T @ keys + ridge * torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device)
    return gaps_DN.double(), torch.linalg.solve(gram_NN, keys.T)


@dataclass(eq=False)
class Edit:
    """A change of one layer's down projection.

    While it is in, the old weight is kept beside the new one: one more matrix of D x F in the model's own type.

    Args:
        layer: The decoder block.
        module: Name of the module; adapters on it stay as they are, the weight below them is edited.
        left: (D, N), or the whole change (D, F).
        right: (N, F); None where ``left`` is the whole change.
        keys: (F, N) what should be answered otherwise; None where that is not known.
        gaps: (D, N) by how much.
        rounding: How far the stored change is from the computed one, as a share of it: what the weight's type loses.
        misses: |W' k - v| / |W k - v| of each key with the weight as stored.
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
        """(D, F)."""
        return self.left.to(dtype) if self.right is None else self.left.to(dtype) @ self.right.to(dtype)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Put it in: computed in float32 at least, stored in the weight's own type.

        Raises:
            UserError: The module is no plain linear one.
        """
        assert self._held is None, "an edit is put in once"
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
        """Put the old tensor back, bit by bit as it was; edits of one weight are taken out last one first."""
        assert self._held is not None, "the edit is not in"
        weight, old, new = self._held
        assert weight.data_ptr() == new.data_ptr(), "a later edit of the same weight is still in"
        weight.data, self._held = old, None


@contextmanager
def edited(model: nn.Module, edits: Sequence[Edit]) -> Iterator[None]:
    """While active, the model computes with the edits; afterwards its weights are the very tensors that they were.

    Args:
        model: The plain model.
        edits: Of any layers, put in one after the other.

    Raises:
        UserError: A layer cannot be edited; none is then.
    """
    done: list[Edit] = []
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
        UserError: The layer has none, or its weight is quantised, or an adapter depends on it in another way.
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
