"""The layout of a multimodal LLM: every parameter's region, and the modules of every decoder block.

Data flow: a loaded (or meta-device) transformers model -> ``_Resolver`` -> ``ModelLayout``: one ``ParameterLocation``
for every parameter, one ``DecoderBlock`` for every block. Policies, census, gradient boundary, hooks and interventions
address parts through it.

The rules, in order: the decoder's blocks are the list inside ``get_decoder()`` whose length is the text config's number
of layers; embeddings and head are returned by the model's accessors; the vision tower is
``get_encoder(modality="image")``; everything between tower and decoder is the connector, even if it is built into the
tower (Qwen-VL's mergers).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

from torch import nn

from lightning_mm.core.errors import UserError
from lightning_mm.models.block_parts import FEED_FORWARD_PARTS, BlockPart, parameters_by_part


class Region(StrEnum):
    """The parts of a model that a policy can name; together they hold every parameter exactly once."""

    VISION = "vision"
    CONNECTOR = "connector"
    EMBEDDING = "embedding"
    LAYERS = "layers"
    NORM = "norm"
    HEAD = "head"
    OTHER = "other"
    """Not on the path from image to text (audio towers, for example): frozen under every policy."""


@dataclass(frozen=True)
class ParameterLocation:
    """Location of one parameter: its region and, inside a decoder block, the block's index and part (else None)."""

    region: Region
    layer: int | None = None
    part: BlockPart | None = None


@dataclass(frozen=True)
class DecoderBlock:
    """The parts of one decoder block, by the names of their modules.

    Args:
        index: Index of the block, from 0.
        name: Module name of the block.
        attention: The token mixer, attention or of another kind; None if the block has none.
        mlp: The feed-forward part, also a mixture of experts; None if the block has none, or has it in pieces.
        o_proj: The linear module at the end of the token mixer; None if there is none.
        down_proj: The linear module at the end of the feed-forward part; None in mixtures of experts.
    """

    index: int
    name: str
    attention: str | None
    mlp: str | None
    o_proj: str | None
    down_proj: str | None


_LAST_LINEARS = ("o_proj", "out_proj", "down_proj", "c_proj", "wo", "w2", "dense", "fc2", "dense_4h_to_h")
"""Usual names of the linear module that writes to the residual stream."""


@dataclass(frozen=True)
class ModelLayout:
    """The resolved layout of one model.

    Args:
        locations: Parameter name -> location; a tied parameter is listed once, under its first name.
        layers: Module names of the decoder's blocks, bottom to top.
        vision_blocks: Module names of the vision tower's blocks; empty if there is no tower.
        embedding: Module name of the token embedding.
        head: Module name of the output projection.
        tied_head: Whether the head's weight is the embedding's.
        linears: Names of the linear modules, which can have adapters.
        stacks: Names of the 3-D parameters that hold one matrix per expert, which can have adapters, too.
    """

    locations: Mapping[str, ParameterLocation]
    layers: tuple[str, ...]
    vision_blocks: tuple[str, ...]
    embedding: str
    head: str
    tied_head: bool
    linears: frozenset[str]
    stacks: frozenset[str] = frozenset()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def parameters_in(self, region: Region) -> tuple[str, ...]:
        """Names of the region's parameters, in the model's order."""
        return tuple(name for name, place in self.locations.items() if place.region is region)

    @cached_property
    def routers(self) -> frozenset[str]:
        """Names of the parameters that send tokens to experts."""
        return frozenset(name for name, place in self.locations.items() if place.part is BlockPart.ROUTER)

    def location_of(self, name: str) -> ParameterLocation:
        """Location of a parameter, also by its name after adapters were added."""
        plain = plain_name(re.sub(r"\.modules_to_save\.[^.]+", "", name))
        owner = re.sub(r"\.lora_\w+(\..*)?$", "", plain)
        if owner == plain:
            return self.locations[plain]
        return self.locations.get(f"{owner}.weight") or self._by_owner[owner]

    @cached_property
    def _by_owner(self) -> dict[str, ParameterLocation]:
        """Location by the name of the module that holds the parameter: experts have adapters, and no ``weight``."""
        return {plain_name(name).rpartition(".")[0]: self.locations[name] for name in self.stacks}

    @cached_property
    def blocks(self) -> tuple[DecoderBlock, ...]:
        """The decoder's blocks, bottom to top."""
        return tuple(self._block(index, name) for index, name in enumerate(self.layers))

    def _block(self, index: int, name: str) -> DecoderBlock:
        attention = self._child(name, BlockPart.ATTENTION) or self._child(name, BlockPart.MIXER)
        mlps = self._children(name, BlockPart.MLP) or self._children(name, *FEED_FORWARD_PARTS)[:1]
        mlp = mlps[0] if len(mlps) == 1 else None
        return DecoderBlock(index, name, attention, mlp, self._last_linear(attention), self._last_linear(mlp))

    def _child(self, block: str, part: BlockPart) -> str | None:
        """Module name of the block's child with the most parameters of a part; None if there is none."""
        return next(iter(self._children(block, part)), None)

    def _children(self, block: str, *parts: BlockPart) -> list[str]:
        """Module names of the block's children with parameters of these parts, those with the most first."""
        inside = (n for n, place in self.locations.items() if n.startswith(f"{block}.") and place.part in parts)
        children = Counter(name.removeprefix(f"{block}.").partition(".")[0] for name in inside)
        return [f"{block}.{child}" for child, _ in children.most_common()]

    def _last_linear(self, module: str | None) -> str | None:
        found = (f"{module}.{name}" for name in _LAST_LINEARS if f"{module}.{name}" in self.linears)
        return next(found, None)

    def without_adapters(self) -> "ModelLayout":
        """The layout with the names that the model had before PEFT put adapters in; the same if there are none."""
        return replace(
            self,
            locations={plain_name(n): place for n, place in self.locations.items() if not _ADAPTER.search(n)},
            linears=frozenset(plain_name(name) for name in self.linears if not _ADAPTER.search(name)),
            stacks=frozenset(map(plain_name, self.stacks)),
        )

    @classmethod
    def of(cls, model: nn.Module) -> "ModelLayout":
        """The layout of a model.

        Args:
            model: An image-text-to-text model of transformers, before adapters are added (they change names); may be
                on the meta device.

        Raises:
            UserError: A part cannot be identified; the candidates are listed.
        """
        return _Resolver(model).resolve()


_ADAPTER = re.compile(r"\.(lora_\w+|modules_to_save)(\.|$)")


def plain_name(name: str) -> str:
    """Name of a parameter or module before PEFT wrapped the module that holds it.

    Example:
        >>> plain_name("model.layers.0.mlp.up_proj.base_layer.weight")
        'model.layers.0.mlp.up_proj.weight'
    """
    return re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name)


class _Resolver:
    """Finds the parts of one model."""

    def __init__(self, model: Any) -> None:
        _refuse_unless_decoder_only(model)
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.text_config = model.config.get_text_config(decoder=True)

    def resolve(self) -> ModelLayout:
        """The layout of the model."""
        embedding = self._embedding()
        decoder, layers = self._decoder_layers()
        head = self._head(embedding)
        tower = self._tower(decoder)
        blocks = _tower_blocks(tower) if tower is not None else ()
        claims: dict[int, ParameterLocation] = {}
        self._claim(claims, embedding, ParameterLocation(Region.EMBEDDING))
        self._claim_decoder(claims, decoder, layers)
        self._claim(claims, head, ParameterLocation(Region.HEAD))
        self._claim_other(claims)
        self._claim_picture_path(claims, tower, blocks)
        named = list(self.model.named_parameters())
        locations = {name: claims[id(parameter)] for name, parameter in named}
        experts, ndim = (BlockPart.EXPERTS, BlockPart.SHARED_EXPERTS), {n: p.ndim for n, p in named}
        return ModelLayout(
            locations=locations,
            layers=tuple(self.names[id(layer)] for layer in layers),
            vision_blocks=tuple(self.names[id(block)] for block in blocks),
            embedding=self.names[id(embedding)],
            head=self.names[id(head)],
            tied_head=head.weight is embedding.weight,
            linears=frozenset(name for name, m in self.model.named_modules() if isinstance(m, nn.Linear)),
            stacks=frozenset(name for name, place in locations.items() if place.part in experts and ndim[name] == 3),
        )

    def _embedding(self) -> nn.Module:
        try:
            return self.model.get_input_embeddings()
        except NotImplementedError as error:
            raise _unknown(self.model, "token embedding", self.names.values()) from error

    def _head(self, embedding: nn.Module) -> nn.Module:
        if (head := self.model.get_output_embeddings()) is not None:
            return head
        linears = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m is not embedding]
        fitting = [m for m in linears if m.out_features == self.text_config.vocab_size]
        if len(fitting) != 1:
            raise _unknown(self.model, "output head", [self.names[id(m)] for m in fitting])
        return fitting[0]

    def _decoder_layers(self) -> tuple[nn.Module, tuple[nn.Module, ...]]:
        """The module that owns the list of decoder blocks, and the blocks."""
        root, depth = self.model.get_decoder(), self.text_config.num_hidden_layers
        lists = {n: m for n, m in root.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
        lists = {n: m for n, m in lists.items() if not _embeds_patches(root.get_submodule(n.partition(".")[0]))}
        outermost = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
        if len(outermost) != 1:
            prefix = self.names.get(id(root), "")
            raise _unknown(self.model, f"list of {depth} decoder blocks", [f"{prefix}.{n}" for n in outermost])
        owner = root.get_submodule(outermost[0].rpartition(".")[0])
        return owner, tuple(lists[outermost[0]])

    def _tower(self, decoder: nn.Module) -> nn.Module | None:
        """The vision tower, or None for models that embed patches directly (Fuyu)."""
        tower = self.model.get_encoder(modality="image")
        if tower is None or any(module is decoder for module in tower.modules()):
            return None
        return tower

    def _claim(self, claims: dict[int, ParameterLocation], module: nn.Module, place: ParameterLocation) -> None:
        for parameter in module.parameters():
            claims.setdefault(id(parameter), place)

    def _claim_decoder(
        self, claims: dict[int, ParameterLocation], decoder: nn.Module, layers: tuple[nn.Module, ...]
    ) -> None:
        width = int(self.text_config.hidden_size)
        for index, layer in enumerate(layers):
            for part, parameter in parameters_by_part(layer, width):
                claims.setdefault(id(parameter), ParameterLocation(Region.LAYERS, index, part))
        for child in decoder.children():
            if "norm" in type(child).__name__.lower():
                self._claim(claims, child, ParameterLocation(Region.NORM))
        if decoder is not self.model.base_model and decoder is not self.model:
            self._claim(claims, decoder, ParameterLocation(Region.EMBEDDING))

    def _claim_other(self, claims: dict[int, ParameterLocation]) -> None:
        audio = self.model.get_encoder(modality="audio")
        if audio is not None and audio not in (self.model, self.model.base_model, self.model.get_decoder()):
            self._claim(claims, audio, ParameterLocation(Region.OTHER))

    def _claim_picture_path(
        self, claims: dict[int, ParameterLocation], tower: nn.Module | None, blocks: tuple[nn.Module, ...]
    ) -> None:
        """Towers and connector: the remaining parameters. Without any outside the tower, it contains its connector."""
        inside = {id(p) for p in tower.parameters()} if tower is not None else set()
        for sibling in self._siblings(tower):
            if _embeds_patches(sibling):
                self._claim(claims, sibling, ParameterLocation(Region.VISION))
        outside = [p for p in self.model.parameters() if id(p) not in claims and id(p) not in inside]
        if tower is not None and not any(p.ndim > 1 for p in outside):
            for module in _built_in_connector(tower, blocks):
                self._claim(claims, module, ParameterLocation(Region.CONNECTOR))
        if tower is not None:
            self._claim(claims, tower, ParameterLocation(Region.VISION))
        for parameter in outside:
            claims.setdefault(id(parameter), ParameterLocation(Region.CONNECTOR))

    def _siblings(self, tower: nn.Module | None) -> Iterator[nn.Module]:
        """Modules beside the tower and the decoder: second towers and connectors."""
        decoder = self.model.get_decoder()
        owners = [self.model] if self.model.base_model is self.model else [self.model, self.model.base_model]
        for module in owners:
            for child in module.children():
                if not any(m is decoder or m is tower for m in child.modules()):
                    yield child


def _embeds_patches(module: nn.Module) -> bool:
    """Whether a module is a tower of its own: it convolves pixels (3 channels) and has a list of blocks."""
    convolves = any(getattr(m, "in_channels", None) == 3 for m in module.modules())
    return convolves and any(isinstance(m, nn.ModuleList) and len(m) > 1 for m in module.modules())


def _tower_blocks(tower: nn.Module) -> tuple[nn.Module, ...]:
    """The tower's blocks: of its lists of modules with attention, the one that holds most weights.

    Mergers that feed several decoder layers (Qwen3-VL) are a list too, and can be the heavier one.
    """
    every: list[nn.ModuleList] = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    lists = [m for m in every if any("attn" in n or "attention" in n for n, _ in m[0].named_modules())] or every
    sizes = [sum(p.numel() for p in m.parameters()) for m in lists]
    return tuple(lists[sizes.index(max(sizes))]) if lists else ()


def _built_in_connector(tower: nn.Module, blocks: tuple[nn.Module, ...]) -> Iterator[nn.Module]:
    """Children of the tower that stand behind its blocks and hold matrices (mergers, down-sampling convolutions)."""
    behind = False
    for child in tower.children():
        if behind and any(p.ndim > 1 for p in child.parameters()):
            yield child
        behind = behind or any(block is module for block in blocks[:1] for module in child.modules())


def _refuse_unless_decoder_only(model: Any) -> None:
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise UserError(
            f"{type(model).__name__} is no model of transformers.",
            "Layers, vision tower and connector are found through the methods of those.",
            "Give what AutoModelForImageTextToText.from_pretrained returns.",
        )
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or not hasattr(text, "num_hidden_layers"):
        raise UserError(
            f"{type(model).__name__} cannot be tuned here.",
            "Layer ranges are defined for multimodal LLMs whose text part is a decoder only.",
            "Choose such a model (LLaVA, Qwen-VL, InternVL, SmolVLM, Gemma 3, ...).",
        )


def _unknown(model: nn.Module, what: str, candidates: Iterable[str]) -> UserError:
    shown = list(candidates)[:12]
    return UserError(
        f"The {what} of {type(model).__name__} cannot be told apart.",
        f"Candidates: {', '.join(shown) or 'none'}.",
        "Report the model's type and this list; a model whose parts are not certain is not trained on a guess.",
    )
