"""Interventions on activations: at a site, in some layers, at some tokens, the output is replaced.

Data flow: ``Intervention``s -> ``apply_interventions`` (forward hooks, while the context lasts) -> forward passes.

Sites are the outputs of the parts of a decoder block: ``attention`` and ``mlp`` before they are added to the residual
stream, ``residual`` the stream after the block.

Shapes: B rows, L tokens, P positions, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_mm.core.errors import UserError
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import uncompiled

Site = Literal["residual", "attention", "mlp"]
Values = Mapping[tuple[Site, int], Tensor]
"""Outputs by site and layer: (B, L, D)."""


@dataclass(frozen=True, eq=False)
class SiteActivation:
    """Activations that an intervention computes its replacement from.

    Args:
        layer: Index of the decoder block.
        output: (B, P, D) output of the site at the intervention's positions.
        input: (B, P, D) input of the site's module at these positions.
        full_output: (B, L, D) output of the site at all tokens.
    """

    layer: int
    output: Tensor
    input: Tensor
    full_output: Tensor


@dataclass(frozen=True, eq=False)
class Intervention:
    """One replacement of activations.

    Args:
        name: Short name, used in error messages.
        site: Site within the block.
        layers: Indices of the decoder blocks.
        positions: (P,) token positions for all rows, or (B, P) for each row; None: all tokens.
        compute: Returns the replacement, which broadcasts to (B, P, D).
    """

    name: str
    site: Site
    layers: tuple[int, ...]
    positions: Tensor | None
    compute: Callable[[SiteActivation], Tensor]

    def shifted(self, start: int) -> "Intervention":
        """A copy for a run without the first ``start`` tokens."""
        return self if self.positions is None else replace(self, positions=self.positions - start)


def set_value(site: Site, layers: Sequence[int], positions: Tensor | None, value: Tensor) -> Intervention:
    """Replace the output by ``value``, which broadcasts to (B, P, D)."""
    return Intervention("put", site, tuple(layers), positions, lambda _: value)


def add_vector(site: Site, layers: Sequence[int], positions: Tensor | None, vector: Tensor) -> Intervention:
    """Add ``vector``, which broadcasts to (B, P, D), to the output (activation steering)."""
    return Intervention("add", site, tuple(layers), positions, lambda activation: activation.output + vector)


def zero_ablate(site: Site, layers: Sequence[int], positions: Tensor | None = None) -> Intervention:
    """Replace the output by zero: the part contributes nothing."""
    return Intervention("zero", site, tuple(layers), positions, lambda activation: torch.zeros_like(activation.output))


def mean_ablate(site: Site, layers: Sequence[int], positions: Tensor) -> Intervention:
    """Replace the output at each position by the mean over the positions: differences between the tokens are lost."""
    return Intervention(
        "mean", site, tuple(layers), positions, lambda activation: activation.output.mean(1, keepdim=True)
    )


def skip_blocks(layers: Sequence[int], positions: Tensor | None = None) -> Intervention:
    """Skip blocks: the residual stream passes unchanged, h_(l+1) = h_l."""
    return Intervention("skip", "residual", tuple(layers), positions, lambda activation: activation.input)


def patch_from(
    site: Site, layers: Sequence[int], positions: Tensor | None, source: Values, at: Tensor | None = None
) -> Intervention:
    """Replace the output by that of another run (activation patching).

    Args:
        site: Site within the block.
        layers: Indices of the decoder blocks.
        positions: (P,) or (B, P) token positions in this run; None: all tokens.
        source: Outputs of the other run, of one row or as many rows as this run has.
        at: Token positions in the other run, shaped as ``positions``; None: the same ones.
    """
    at = positions if at is None else at
    # ``shifted`` moves the positions of this run; those of the source stay.
    return Intervention(
        "patch",
        site,
        tuple(layers),
        positions,
        lambda activation: _gather_positions(source[site, activation.layer], at),
    )


def resample_ablate(
    site: Site, layers: Sequence[int], positions: Tensor | None, pool: Values, generator: torch.Generator
) -> Intervention:
    """Replace the output by that of a random row of ``pool`` at the same positions (resample ablation)."""

    def drawn(activation: SiteActivation) -> Tensor:
        values = _gather_positions(pool[site, activation.layer], positions)
        row = torch.randint(len(values), (len(activation.output),), generator=generator)
        return values[row.to(values.device)]

    return Intervention("resample", site, tuple(layers), positions, drawn)


@contextmanager
def apply_interventions(mm: MultimodalModel, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Context in which every forward pass of the model applies the interventions, in the order given.

    All hooks are removed when it ends. Works with adapters, quantized weights and activation checkpointing; compiled
    blocks run uncompiled inside it.

    Args:
        mm: The unwrapped model.
        interventions: Interventions to apply.

    Raises:
        UserError: A layer has no such site; or, when the context ends, an intervention never took effect.
    """
    took = {(number, layer): False for number, each in enumerate(interventions) for layer in each.layers}
    handles = []
    try:
        with uncompiled(mm.model):
            for number, each in enumerate(interventions):
                for layer in each.layers:
                    name = _site_module(mm.layout.blocks, each.site, layer)
                    hook = _intervention_hook(each, layer, took, (number, layer))
                    handles.append(mm.model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
            yield
    finally:
        for handle in handles:
            handle.remove()
    missed = [interventions[number].name + f" in layer {layer}" for (number, layer), done in took.items() if not done]
    if missed:
        raise UserError(
            "An intervention did not take effect.",
            f"The forward pass never came by: {', '.join(missed[:5])}.",
            "Run the model inside the context, and choose layers that it runs.",
        )


def layer_window(center: int, width: int, num_layers: int, convention: Literal["p2", "rome"] = "p2") -> tuple[int, ...]:
    """The layers of a window around ``center``, clipped to the model.

    ``p2`` (code of Basu et al. 2024, arXiv:2406.04236): width 1 is the layer alone, width w > 1 the 2w + 1 layers
    around it. ``rome`` (Meng et al. 2022, arXiv:2202.05262): w layers, half of them below.

    Example:
        >>> layer_window(5, 3, 32), layer_window(5, 3, 32, "rome"), layer_window(5, 1, 32), layer_window(0, 3, 32)
        ((2, 3, 4, 5, 6, 7, 8), (4, 5, 6), (5,), (0, 1, 2, 3))
    """
    if convention == "rome":
        return tuple(range(max(0, center - width // 2), min(num_layers, center - (-width // 2))))
    if width == 1:
        return (center,)
    return tuple(range(max(0, center - width), min(num_layers - 1, center + width) + 1))


def _site_module(blocks: Sequence[Any], site: Site, layer: int) -> str:
    block = blocks[layer]
    name: str | None = {"residual": block.name, "attention": block.attention, "mlp": block.mlp}[site]
    if name is None:
        raise UserError(f"Layer {layer} has no {site} part.", "Its block is built otherwise.", "Name another site.")
    return name


def _intervention_hook(
    each: Intervention, layer: int, took: dict[tuple[int, int], bool], key: tuple[int, int]
) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        entering = args[0] if args else kwargs["hidden_states"]
        if entering.ndim != 3:
            raise _no_positions(each.site, layer)
        # Some modules return the rows flattened to (B * L, D): Llama 4's experts.
        x_BLD = x.reshape(*entering.shape[:2], -1)
        activation = SiteActivation(
            layer, _gather_positions(x_BLD, each.positions), _gather_positions(entering, each.positions), x_BLD
        )
        changed = _scatter_positions(x_BLD, each.positions, each.compute(activation).to(x_BLD)).reshape(x.shape)
        took[key] = True
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    return hook


def _no_positions(site: Site, layer: int) -> UserError:
    return UserError(
        f"The {site} part of layer {layer} cannot be intervened on.",
        "It is given the tokens of all rows in one, so that they have no positions there.",
        "Name another site, or other layers.",
    )


def _gather_positions(x_BLD: Tensor, positions: Tensor | None) -> Tensor:
    """(B, P, D) values at the positions."""
    if positions is None:
        return x_BLD
    positions = positions.to(x_BLD.device)
    if positions.ndim == 1:
        return x_BLD[:, positions]
    return x_BLD.expand(len(positions), -1, -1).gather(1, positions[..., None].expand(-1, -1, x_BLD.shape[2]))


def _scatter_positions(x_BLD: Tensor, positions: Tensor | None, value: Tensor) -> Tensor:
    """(B, L, D) copy of x with ``value`` at the positions; the original may be referenced elsewhere."""
    if positions is None:
        return value.expand_as(x_BLD).clone()
    positions = positions.to(x_BLD.device)
    if positions.ndim == 1:
        positions = positions.expand(len(x_BLD), -1)
    index = positions[..., None].expand(-1, -1, x_BLD.shape[2])
    return x_BLD.scatter(1, index, value.expand_as(index))
