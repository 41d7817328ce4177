"""Where the parts are: on every architecture of transformers that builds here, and on shapes that mislead names."""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from lightning_mm.core.errors import UserError
from lightning_mm.models.block_parts import BlockPart
from lightning_mm.models.layout import ModelLayout, Region
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.testing.tiny import FAMILIES

REFUSED = {
    "encoder-decoder": {
        "florence2",
        "pix2struct",
        "pp_formulanet",
        "t5gemma2",
        "udop",
        "vision-encoder-decoder",
        "pi0",
    },
    "two lists of blocks": {"idefics"},
}
MERGERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "qwen3_5")
"""Their connector is built into the tower."""


def on_meta(name: str) -> nn.Module | None:
    """A type's model from its default config; None where that does not build here (timm, broken defaults)."""
    config, model = next((c, m) for c, m in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.items() if c.model_type == name)
    model = model[0] if isinstance(model, (tuple, list)) else model
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return model(config())  # type: ignore[no-any-return]
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError):
        return None


TYPES = sorted({config.model_type for config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING})


def test_every_decoder_only_type_is_resolved_or_refused() -> None:
    """One pass over all types: they share the import, which is most of the time."""
    outcome: dict[str, str] = {}
    for name in TYPES:
        model = on_meta(name)
        if model is None:
            continue
        try:
            layout = ModelLayout.of(model)
        except UserError:
            outcome[name] = "refused"
            continue
        outcome[name] = "resolved"
        parameters = dict(model.named_parameters())
        assert layout.locations.keys() == parameters.keys(), name
        text = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        assert layout.num_layers == text.num_hidden_layers, name
        weights = Counter[Region]()
        for parameter, place in layout.locations.items():
            weights[place.region] += parameters[parameter].numel()
        layers = {place.layer for place in layout.locations.values() if place.region is Region.LAYERS}
        assert layers == set(range(layout.num_layers)), name
        assert weights[Region.EMBEDDING] > 0, name
        assert layout.tied_head == (weights[Region.HEAD] == 0) or name == "blip", name
        if name in MERGERS:
            assert weights[Region.CONNECTOR] > 0, name
            assert weights[Region.VISION] > weights[Region.CONNECTOR], name
    known = set().union(*REFUSED.values())
    assert {name for name, what in outcome.items() if what == "refused"} <= known
    assert Counter(outcome.values())["resolved"] >= 60


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_regions_agree_with_the_order_of_use(name: str, family: Callable[[str], Path]) -> None:
    """A change below the decoder reaches block 0's input; a change in block i reaches no earlier block."""
    model = load_model(Backbone(path=str(family(name))))
    layout = ModelLayout.of(model)
    assert len(layout.layers) == 4
    assert all(isinstance(model.get_submodule(block), nn.Module) for block in layout.vision_blocks)
    assert model.get_submodule(layout.head) is model.get_output_embeddings()
    parts = {place.part for place in layout.locations.values() if place.region is Region.LAYERS}
    assert parts == {BlockPart.ATTENTION, BlockPart.MLP, BlockPart.NORM}
    assert layout.parameters_in(Region.CONNECTOR)
    assert layout.parameters_in(Region.VISION)
    assert not layout.parameters_in(Region.OTHER)


def test_a_renamed_model_is_found_by_its_objects(family: Callable[[str], Path]) -> None:
    """Names are only labels: a tower whose blocks carry the decoder's name is still the tower."""
    model = load_model(Backbone(path=str(family("llava"))))
    tower = model.get_encoder(modality="image")
    tower.language_model = tower.encoder
    del tower.encoder
    layout = ModelLayout.of(model)
    assert all(".vision_tower.language_model." in f".{block}." for block in layout.vision_blocks)
    assert all(".vision_tower." not in f".{block}." for block in layout.layers)


def test_what_cannot_be_told_apart_is_an_error_with_candidates(family: Callable[[str], Path]) -> None:
    model = load_model(Backbone(path=str(family("llava"))))
    decoder = model.get_decoder()
    decoder.more_layers = nn.ModuleList(nn.Linear(4, 4) for _ in decoder.layers)
    with pytest.raises(UserError, match=r"more_layers"):
        ModelLayout.of(model)
