"""Every recipe on the meta device, without weights: its blocks, census and LoRA targets, and the published parameters.

Sizes of a decoder block are computed by hand from the released configuration.
"""

import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn
from transformers import AutoConfig

from lightning_mm import tuning
from lightning_mm.__main__ import main
from lightning_mm.cli.shipped_configs import shipped_names
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout, Region
from lightning_mm.models.loading import Backbone, load_skeleton
from lightning_mm.models.lora import LoRA
from lightning_mm.planning.meta_modes import meta_weights
from lightning_mm.testing import SHAPES, build_shape, shape
from lightning_mm.tuning.apply import apply_plan
from lightning_mm.tuning.census import take_census
from lightning_mm.tuning.policies import LoRAOnMiddle
from tests.helpers.cli import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import recipes

TUNED = {"llava-1.5-7b": range(6, 17)}
"""Blocks that a recipe names by index; the others train 25%-50%."""
PLANNED = ["paligemma2-3b"]
"""Recipes whose generated lines are computed again: one that needs QLoRA on 24 GB, and whose decoder has no SDPA."""
# Linear maps of a block: four of attention and three of a gated MLP; GLM has two of these in one, experts are no maps.
NUM_LINEARS = {"glm-4.1v-9b": 6, "qwen3-vl-30b-a3b": 4}
recipe = pytest.mark.parametrize("name", SHAPES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a released configuration, by the name of its recipe."""
    scratch = tmp_path_factory.mktemp("shapes")
    return cache(lambda name: build_shape(name, scratch / name))


@pytest.fixture(scope="module")
def skeleton(folder: Callable[[str], Path]) -> Callable[[str], tuple[nn.Module, ModelLayout]]:
    """The model on the meta device and its layout, by the name of its recipe."""

    def build(name: str) -> tuple[nn.Module, ModelLayout]:
        model = load_skeleton(Backbone(path=str(folder(name))))
        return model, ModelLayout.of(model)

    return cache(build)


def policy_of(name: str) -> Any:
    written = yaml.safe_load((ROOT / f"configs/models/{name}.yaml").read_text())["model"]["tuning"]
    options = dict(written["init_args"])
    if "lora" in options:
        options["lora"] = LoRA(**options["lora"])
    return getattr(tuning, written["class_path"])(**options)


def matrices_of_a_block(folder: Path) -> int:
    """Weights of a decoder block's matrices, by the released sizes."""
    text: Any = AutoConfig.from_pretrained(folder).text_config
    width, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or width // heads
    attention = width * head * (2 * heads + 2 * text.num_key_value_heads)
    if (experts := getattr(text, "num_experts", 0)) > 0:
        return int(attention + experts * (3 * width * text.moe_intermediate_size + width))
    return int(attention + 3 * width * text.intermediate_size)


def test_every_recipe_has_a_shape() -> None:
    shipped = {Path(name).stem for name in shipped_names() if name.startswith("models/")}
    assert shipped == set(SHAPES)
    assert len(shipped) >= 16
    for name in SHAPES:
        written = yaml.safe_load((ROOT / f"configs/models/{name}.yaml").read_text())
        assert written["model"]["backbone"]["path"] == shape(name).hub


def test_the_file_for_24_gb_keeps_the_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "-c", "models/llava-1.5-7b.yaml", "-c", "trainer/gpu-24gb.yaml", "--print_config"])
    assert stopped.value.code == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["tuning"]["class_path"].endswith("LoRAOnMiddle")
    assert model["tuning"]["init_args"]["layers"] == "6-16"
    assert model["backbone"]["path"] == shape("llava-1.5-7b").hub
    assert model["backbone"]["quantization"] == "nf4"


@recipe
def test_parameters_are_the_published_ones(name: str, skeleton: Callable[[str], tuple[nn.Module, ModelLayout]]) -> None:
    """Within what the hub's three digits leave open, 1 in 200, and a block as by hand but for norms and biases."""
    model, layout = skeleton(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(shape(name).parameters, rel=5e-3)
    text = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    assert layout.num_layers == text.num_hidden_layers
    for region in (Region.VISION, Region.CONNECTOR, Region.EMBEDDING, Region.LAYERS, Region.NORM):
        assert layout.parameters_in(region), region
    assert not layout.parameters_in(Region.OTHER)
    assert len(layout.vision_blocks) >= 24


@recipe
def test_census_and_targets(
    name: str, folder: Callable[[str], Path], skeleton: Callable[[str], tuple[nn.Module, ModelLayout]]
) -> None:
    model, layout = skeleton(name)
    depth = layout.num_layers
    blocks = tuple(TUNED.get(name, range(depth // 4, depth // 2)))
    policy = policy_of(name)
    adapters = LoRAOnMiddle(policy.layers).plan(layout)
    assert adapters.layers == blocks
    assert len(adapters.adapted) == NUM_LINEARS.get(name, 7) * len(blocks)
    assert {layout.location_of(f"{target}.weight").layer for target in adapters.adapted} == set(blocks)
    with meta_weights():
        plan = policy.plan(layout)
        if plan.adapted:  # PEFT would change the model that the other tests share
            model = load_skeleton(Backbone(path=str(folder(name))))
        apply_plan(MultimodalModel(model, layout), plan)
    census = take_census(MultimodalModel(model, layout), plan)
    assert census.layers == blocks
    if not plan.adapted:
        # Norms and the biases of queries, keys and values are not counted by hand: less than 1 in 1000 of a block.
        assert census.trainable == pytest.approx(len(blocks) * matrices_of_a_block(folder(name)), rel=1e-3)
    else:
        inside = [model.get_submodule(target) for target in sorted(plan.adapted)]
        shapes = [module.base_layer.weight.shape for module in inside]  # type: ignore[union-attr]
        stacks = [skeleton(name)[0].get_parameter(stack).shape for stack in sorted(plan.adapted_stacks)]
        assert bool(stacks) == (name == "qwen3-vl-30b-a3b")
        linear = sum(16 * (rows + columns) for rows, columns in shapes)
        assert census.trainable == linear + sum(16 * each * (rows + columns) for each, rows, columns in stacks)
    assert {row.mode for row in census.rows if row.trainable} == {"lora" if plan.adapted else "full"}


@pytest.mark.parametrize("name", PLANNED)
def test_generated_lines_are_what_plan_says(name: str, tmp_path: Path) -> None:
    """For all: python scripts/recipes.py, which leaves the files as they are."""
    cost = recipes.recipe_cost(name, build_shape(name, tmp_path / name))
    text = (ROOT / f"configs/models/{name}.yaml").read_text(encoding="utf-8")
    assert recipes.with_header(text, cost) == text
    page = recipes.PAGE.read_text(encoding="utf-8")
    assert recipes.with_row(page, cost) == page


def test_every_recipe_has_its_lines_and_its_row() -> None:
    page = recipes.PAGE.read_text(encoding="utf-8")
    for name in SHAPES:
        text = (ROOT / f"configs/models/{name}.yaml").read_text(encoding="utf-8")
        cards = re.findall(r"^# plan: (80|24) GB: (.*)$", text, re.M)
        assert [card for card, _ in cards] == ["80", "24"]
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        for _, said in cards:
            memory = re.search(r"[\d.]+ GiB", said)
            assert memory is not None
            assert memory[0] in row
