"""One small algebra of interventions: at a site, in some layers, at some tokens, something else is put in place.

Data flow: ``Intervention``s -> ``intervened`` (hooks, as long as the context lasts) -> the model computes with them.

Sites are what each decoder block's parts put out: ``attention`` and ``mlp`` before they are added to the stream,
``residual`` the stream itself after the block.

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
"""What sites put out, by site and layer: (B, L, D)."""


@dataclass(frozen=True, eq=False)
class Change:
    """What an intervention is given to work with.

    Args:
        layer: The decoder block.
        output: (B, P, D) what the site puts out at the positions.
        entering: (B, P, D) what entered the module there.
        everywhere: (B, L, D) the output at all tokens.
    """

    layer: int
    output: Tensor
    entering: Tensor
    everywhere: Tensor


@dataclass(frozen=True, eq=False)
class Intervention:
    """One change.

    Args:
        name: What it does, as told in errors.
        site: Where in the block.
        layers: Which blocks.
        positions: (P,) tokens for all rows, or (B, P) for each row its own; None: all.
        new: What is put in place, (B, P, D) or something that broadcasts to it.
    """

    name: str
    site: Site
    layers: tuple[int, ...]
    positions: Tensor | None
    new: Callable[[Change], Tensor]

    def shifted(self, start: int) -> "Intervention":
        """The same for a run that leaves out the first ``start`` tokens."""
        return self if self.positions is None else replace(self, positions=self.positions - start)


def put(site: Site, layers: Sequence[int], positions: Tensor | None, value: Tensor) -> Intervention:
    """Put ``value`` in place: anything that broadcasts to (B, P, D)."""
    return Intervention("put", site, tuple(layers), positions, lambda change: value)


def add(site: Site, layers: Sequence[int], positions: Tensor | None, vector: Tensor) -> Intervention:
    """Add ``vector``: anything that broadcasts to (B, P, D)."""
    return Intervention("add", site, tuple(layers), positions, lambda change: change.output + vector)


def zero(site: Site, layers: Sequence[int], positions: Tensor | None = None) -> Intervention:
    """Take a part's contribution away."""
    return Intervention("zero", site, tuple(layers), positions, lambda change: torch.zeros_like(change.output))


def mean(site: Site, layers: Sequence[int], positions: Tensor) -> Intervention:
    """Put the mean over the positions at each of them: what differs between the tokens (of a picture, say) is lost."""
    return Intervention("mean", site, tuple(layers), positions, lambda change: change.output.mean(1, keepdim=True))


def skip(layers: Sequence[int], positions: Tensor | None = None) -> Intervention:
    """Let the stream pass a block unchanged: h_(l+1) = h_l."""
    return Intervention("skip", "residual", tuple(layers), positions, lambda change: change.entering)


def patch(
    site: Site, layers: Sequence[int], positions: Tensor | None, source: Values, at: Tensor | None = None
) -> Intervention:
    """Put what another run had.

    Args:
        site: Where.
        layers: Which blocks.
        positions: (P,) or (B, P) tokens of this run; None: all.
        source: The other run's values, one row of them or as many as this run has.
        at: Tokens of the other run, as ``positions``; None: the same ones.
    """
    at = positions if at is None else at
    # Positions are moved in runs that leave tokens out; those of the source stay where they are.
    return Intervention("patch", site, tuple(layers), positions, lambda change: _taken(source[site, change.layer], at))


def resample(
    site: Site, layers: Sequence[int], positions: Tensor | None, pool: Values, generator: torch.Generator
) -> Intervention:
    """Put what a random other row of the pool had at the same tokens: in distribution, but uninformative."""

    def drawn(change: Change) -> Tensor:
        values = _taken(pool[site, change.layer], positions)
        row = torch.randint(len(values), (len(change.output),), generator=generator)
        return values[row.to(values.device)]

    return Intervention("resample", site, tuple(layers), positions, drawn)


@contextmanager
def intervened(mm: MultimodalModel, interventions: Sequence[Intervention]) -> Iterator[None]:
    """While active, every forward pass of the model computes with the interventions, in the order given.

    Nothing is left behind: no hook, no changed tensor. Works on adapters, quantised weights and under checkpointing;
    blocks that were compiled run uncompiled meanwhile.

    Args:
        mm: The plain model.
        interventions: What to do.

    Raises:
        UserError: A layer has no such site; or, when the context ends, an intervention never took effect.
    """
    took = {(number, layer): False for number, each in enumerate(interventions) for layer in each.layers}
    handles = []
    try:
        with uncompiled(mm.model):
            for number, each in enumerate(interventions):
                for layer in each.layers:
                    name = _module_of(mm.layout.blocks, each.site, layer)
                    hook = _changing(each, layer, took, (number, layer))
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


def window(center: int, width: int, num_layers: int, convention: Literal["p2", "rome"] = "p2") -> tuple[int, ...]:
    """The layers that are restored together.

    ``p2`` (2406.04236 as coded): width 1 is the layer alone, width w > 1 the 2w + 1 layers around it. ``rome`` (Meng et
    al. 2022): w layers, half of them below.

    Example:
        >>> window(5, 3, 32), window(5, 3, 32, "rome"), window(5, 1, 32), window(0, 3, 32)
        ((2, 3, 4, 5, 6, 7, 8), (4, 5, 6), (5,), (0, 1, 2, 3))
    """
    if convention == "rome":
        return tuple(range(max(0, center - width // 2), min(num_layers, center - (-width // 2))))
    if width == 1:
        return (center,)
    return tuple(range(max(0, center - width), min(num_layers - 1, center + width) + 1))


def _module_of(blocks: Sequence[Any], site: Site, layer: int) -> str:
    block = blocks[layer]
    name: str | None = {"residual": block.name, "attention": block.attention, "mlp": block.mlp}[site]
    if name is None:
        raise UserError(f"Layer {layer} has no {site} part.", "Its block is built otherwise.", "Name another site.")
    return name


def _changing(
    each: Intervention, layer: int, took: dict[tuple[int, int], bool], key: tuple[int, int]
) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        entering = args[0] if args else kwargs["hidden_states"]
        if entering.ndim != 3:
            raise _unplaced(each.site, layer)
        # Some put the rows out in one, (B * L, D): Llama 4's experts.
        x_BLD = x.reshape(*entering.shape[:2], -1)
        change = Change(layer, _taken(x_BLD, each.positions), _taken(entering, each.positions), x_BLD)
        changed = _placed(x_BLD, each.positions, each.new(change).to(x_BLD)).reshape(x.shape)
        took[key] = True
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    return hook


def _unplaced(site: Site, layer: int) -> UserError:
    return UserError(
        f"The {site} part of layer {layer} cannot be intervened on.",
        "It is given the tokens of all rows in one, so that they have no positions there.",
        "Name another site, or other layers.",
    )


def _taken(x_BLD: Tensor, positions: Tensor | None) -> Tensor:
    """(B, P, D)."""
    if positions is None:
        return x_BLD
    positions = positions.to(x_BLD.device)
    if positions.ndim == 1:
        return x_BLD[:, positions]
    return x_BLD.expand(len(positions), -1, -1).gather(1, positions[..., None].expand(-1, -1, x_BLD.shape[2]))


def _placed(x_BLD: Tensor, positions: Tensor | None, value: Tensor) -> Tensor:
    """A copy of x with the value at the positions: what others hold of it stays as it is."""
    if positions is None:
        return value.expand_as(x_BLD).clone()
    positions = positions.to(x_BLD.device)
    if positions.ndim == 1:
        positions = positions.expand(len(x_BLD), -1)
    index = positions[..., None].expand(-1, -1, x_BLD.shape[2])
    return x_BLD.scatter(1, index, value.expand_as(index))
