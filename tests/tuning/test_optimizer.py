"""NF4 below and above, full rank in the middle: what is frozen is quantised, what trains is not, and both are told."""

from functools import cache
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from lightning_mm.models.layout import Region
from lightning_mm.models.loading import Backbone
from lightning_mm.testing.tiny import build_tiny
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import IntermediateOnly, LoRA, LoRAOnMiddle, TuningPolicy
from tests.helpers.data import Family, batch_of
from tests.helpers.training import losses_of


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Families whose rows are whole blocks of 64 values, as NF4 wants them."""
    return cache(lambda name: build_tiny(name, tmp_path_factory.mktemp("wide") / name, hidden=64))


def configured(folder: Path, tuning: TuningPolicy) -> MMModule:
    module = MMModule(Backbone(path=str(folder), quantization="nf4"), tuning)
    module.configure_model()
    return module


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
def test_what_is_frozen_is_in_four_bits(name: str, wide: Family, data: dict[str, Path]) -> None:
    tuning = IntermediateOnly(layers="1-2", connector="full")
    module = configured(wide(name), tuning)
    for module_name in module.mm.layout.linears - {module.mm.layout.head}:
        linear = module.model.get_submodule(module_name)
        trained = f"{module_name}.weight" in module.plan.full
        assert isinstance(linear, Linear4bit) != trained, module_name
    assert {row.dtype for row in module.census.rows if row.region == "layers 1-2"} == {"float32"}
    assert all("nf4" in row.dtype for row in module.census.rows if row.region in ("layers 0", "layers 3"))
    optimizer = torch.optim.AdamW(module.trainable.values(), lr=1e-2)
    batch = batch_of(wide(name), data)
    losses = losses_of(module, batch, optimizer, 5)
    assert losses[-1] < losses[0]


def test_lora_stands_on_quantised_layers(wide: Family, data: dict[str, Path]) -> None:
    module = configured(wide("llava"), LoRAOnMiddle(layers="1-2", lora=LoRA(r=4)))
    assert {module.mm.layout.location_of(name.removeprefix("model.")).region for name in module.trainable} == {
        Region.LAYERS
    }
    module.objective(batch_of(wide("llava"), data)).nll.backward()
    assert all(
        isinstance(parameter, nn.Parameter) and parameter.grad is not None for parameter in module.trainable.values()
    )
