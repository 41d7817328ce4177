"""Where the parts of a multimodal LLM are, found on the model object and never by a table of families.

Data flow: a loaded (or meta-device) Hugging Face model -> ``resolving`` -> ``Anatomy``: one ``Place`` for every
parameter, one ``Block`` for every decoder block. Policies, the census, the boundary, taps and interventions speak of
parts through it.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from torch import nn


class Region(StrEnum):
    """The parts of a model that a policy can name; together they hold every parameter exactly once."""

    VISION = "vision"
    CONNECTOR = "connector"
    EMBEDDING = "embedding"
    LAYERS = "layers"
    NORM = "norm"
    HEAD = "head"
    OTHER = "other"
    """Off the way from picture to text (audio towers, say): frozen under every policy."""


class Part(StrEnum):
    """The parts of one decoder block."""

    ATTENTION = "attention"
    MLP = "mlp"
    NORM = "norm"


@dataclass(frozen=True)
class Place:
    """Where one parameter sits: its region and, inside a decoder block, the block's index and part."""

    region: Region
    layer: int | None = None
    part: Part | None = None


@dataclass(frozen=True)
class Block:
    """The parts of one decoder block, by the names of their modules.

    Args:
        index: Its place, from 0.
        name: Of the block.
        attention: Its token mixer; None where it has none.
        mlp: Its feed-forward part; None where it has none.
        o_proj: The linear module that ends the token mixer; None where it ends otherwise.
        down_proj: The linear module that ends the feed-forward part; None in mixtures of experts.
    """

    index: int
    name: str
    attention: str | None
    mlp: str | None
    o_proj: str | None
    down_proj: str | None


_LAST_LINEARS = ("o_proj", "out_proj", "down_proj", "c_proj", "wo", "w2", "dense", "fc2", "dense_4h_to_h")
"""What the field calls the linear module that leads back into the stream."""


@dataclass(frozen=True)
class Anatomy:
    """The resolved layout of one model.

    Args:
        places: Parameter name -> place; a tied parameter stands once, under its first name.
        layers: Module names of the decoder's blocks, bottom to top.
        vision_blocks: Module names of the vision tower's blocks; empty where there is no tower.
        embedding: Module name of the token embedding.
        head: Module name of the output projection.
        tied_head: Whether the head's weight is the embedding's.
        linears: Names of the linear modules: what an adapter can stand on.
    """

    places: Mapping[str, Place]
    layers: tuple[str, ...]
    vision_blocks: tuple[str, ...]
    embedding: str
    head: str
    tied_head: bool
    linears: frozenset[str]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def parameters_in(self, region: Region) -> tuple[str, ...]:
        """Names of the region's parameters, in the model's order."""
        return tuple(name for name, place in self.places.items() if place.region is region)

    def place_of(self, name: str) -> Place:
        """Place of a parameter, also after adapters were put in and changed or added names."""
        plain = re.sub(r"\.lora_\w+(\..*)?$", ".weight", name.replace(".base_layer.", "."))
        return self.places[plain]

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The decoder's blocks, bottom to top."""
        return tuple(self._block(index, name) for index, name in enumerate(self.layers))

    def _block(self, index: int, name: str) -> Block:
        attention, mlp = (self._child(name, part) for part in (Part.ATTENTION, Part.MLP))
        return Block(index, name, attention, mlp, self._last_linear(attention), self._last_linear(mlp))

    def _child(self, block: str, part: Part) -> str | None:
        """The block's child that holds the most tensors of a part."""
        inside = [name for name, place in self.places.items() if name.startswith(f"{block}.") and place.part is part]
        children = Counter(name.removeprefix(f"{block}.").partition(".")[0] for name in inside)
        return f"{block}.{children.most_common(1)[0][0]}" if children else None

    def _last_linear(self, module: str | None) -> str | None:
        found = (f"{module}.{name}" for name in _LAST_LINEARS if f"{module}.{name}" in self.linears)
        return next(found, None)

    @classmethod
    def of(cls, model: nn.Module) -> "Anatomy":
        """Resolve a model.

        Args:
            model: A transformers model of the image-text-to-text kind; the meta device will do.

        Raises:
            UserError: A part cannot be told apart; the candidates are listed.

        Note:
            Call it on the plain model, before adapters are put in: they change names.
        """
        from lightning_mm.models.resolving import Resolver  # it makes what is defined here

        return Resolver(model).resolve()
