"""The rules by which the parts of a model are found.

Data flow: a transformers model -> ``Resolver.resolve`` -> ``Anatomy``.

The rules, in order: the decoder's blocks are the list inside ``get_decoder()`` as long as the text config says;
embeddings and head are what the model's own accessors return; the vision tower is ``get_encoder(modality="image")``;
what lies between tower and decoder is the connector, also where it is built into the tower (Qwen-VL's mergers).
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lightning_mm.errors import UserError
from lightning_mm.models.anatomy import Anatomy, Part, Place, Region


class Resolver:
    """Finds the parts of one model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.text_config = model.config.get_text_config(decoder=True)
        _refuse_unless_decoder_only(model)

    def resolve(self) -> Anatomy:
        embedding = self._embedding()
        decoder, layers = self._decoder_layers()
        head = self._head(embedding)
        tower = self._tower(decoder)
        blocks = _tower_blocks(tower) if tower is not None else ()
        claims: dict[int, Place] = {}
        self._claim(claims, embedding, Place(Region.EMBEDDING))
        self._claim_decoder(claims, decoder, layers)
        self._claim(claims, head, Place(Region.HEAD))
        self._claim_other(claims)
        self._claim_picture_path(claims, tower, blocks)
        places = {name: claims[id(parameter)] for name, parameter in self.model.named_parameters()}
        return Anatomy(
            places=places,
            layers=tuple(self.names[id(layer)] for layer in layers),
            vision_blocks=tuple(self.names[id(block)] for block in blocks),
            embedding=self.names[id(embedding)],
            head=self.names[id(head)],
            tied_head=head.weight is embedding.weight,
            linears=frozenset(name for name, m in self.model.named_modules() if isinstance(m, nn.Linear)),
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

    def _claim(self, claims: dict[int, Place], module: nn.Module, place: Place) -> None:
        for parameter in module.parameters():
            claims.setdefault(id(parameter), place)

    def _claim_decoder(self, claims: dict[int, Place], decoder: nn.Module, layers: tuple[nn.Module, ...]) -> None:
        for index, layer in enumerate(layers):
            for part, parameter in _parts(layer):
                claims.setdefault(id(parameter), Place(Region.LAYERS, index, part))
        for child in decoder.children():
            if "norm" in type(child).__name__.lower():
                self._claim(claims, child, Place(Region.NORM))
        if decoder is not self.model.base_model and decoder is not self.model:
            self._claim(claims, decoder, Place(Region.EMBEDDING))

    def _claim_other(self, claims: dict[int, Place]) -> None:
        audio = self.model.get_encoder(modality="audio")
        if audio is not None and audio not in (self.model, self.model.base_model, self.model.get_decoder()):
            self._claim(claims, audio, Place(Region.OTHER))

    def _claim_picture_path(
        self, claims: dict[int, Place], tower: nn.Module | None, blocks: tuple[nn.Module, ...]
    ) -> None:
        """Towers and connector: all that is left. A tower with nothing outside it carries its own connector."""
        inside = {id(p) for p in tower.parameters()} if tower is not None else set()
        for sibling in self._siblings(tower):
            if _embeds_patches(sibling):
                self._claim(claims, sibling, Place(Region.VISION))
        outside = [p for p in self.model.parameters() if id(p) not in claims and id(p) not in inside]
        if tower is not None and not any(p.ndim > 1 for p in outside):
            for module in _built_in_connector(tower, blocks):
                self._claim(claims, module, Place(Region.CONNECTOR))
        if tower is not None:
            self._claim(claims, tower, Place(Region.VISION))
        for parameter in outside:
            claims.setdefault(id(parameter), Place(Region.CONNECTOR))

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


def _parts(layer: nn.Module) -> Iterator[tuple[Part, nn.Parameter]]:
    """Each parameter of a block with its part: norms by class, feed-forwards by class, else the token mixer."""
    for name, child in layer.named_children():
        kind = f"{name} {type(child).__name__}".lower()
        feed_forward = any(word in kind for word in ("mlp", "moe", "feed_forward", "feedforward", "ffn", "expert"))
        for module in child.modules():
            norm = "norm" in type(module).__name__.lower()
            part = Part.NORM if norm else Part.MLP if feed_forward else Part.ATTENTION
            yield from ((part, parameter) for parameter in module.parameters(recurse=False))
    yield from ((Part.NORM, parameter) for parameter in layer.parameters(recurse=False))


def _refuse_unless_decoder_only(model: Any) -> None:
    text = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False) or not hasattr(text, "num_hidden_layers"):
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
