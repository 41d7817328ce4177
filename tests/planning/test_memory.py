"""Foretold memory against what torch's profiler saw a real step take."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_mm.data.batch import Batch
from lightning_mm.models.loading import Backbone
from lightning_mm.planning.cost_estimate import CostEstimate, MetaModel, RunSettings, estimate_cost
from lightning_mm.planning.devices import DEVICES
from lightning_mm.planning.memory import optimizer_bytes
from lightning_mm.testing.tiny import build_tiny
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import Full, IntermediateOnly, LoRA, LoRAOnMiddle, TuningPolicy
from lightning_mm.tuning.optimizer import build_optimizer, parameter_groups
from tests.helpers.data import Data, Family, batch_of

NANO = Path(__file__).parents[2] / "nano"
POLICIES: dict[str, TuningPolicy] = {
    "full": Full(),
    "layers": IntermediateOnly(layers="2-3"),
    "lora": LoRAOnMiddle(layers="2-3", lora=LoRA(r=4)),
}


HERE = replace(DEVICES["h200"], is_cpu=True)
"""Memory is measured on a CPU; how fast it is does not count."""


def foretold(folder: Path, policy: TuningPolicy, batch: Batch, setting: RunSettings = RunSettings()) -> CostEstimate:  # noqa: B008
    return estimate_cost(MetaModel(Backbone(path=str(folder)), batch), policy, [batch], setting, HERE)


def measured(folder: Path, policy: TuningPolicy, batch: Batch, checkpointing: bool = False) -> float:
    """Bytes at the peak of two steps: weights, optimizer states, and all that the profiler saw come and go.

    It does not see that something goes which came before it, so gradients are gone when it begins.
    """
    module = MMModule(Backbone(path=str(folder)), policy, activation_checkpointing=checkpointing)
    module.unread = ()
    module.configure_model()
    groups = parameter_groups(module.mm, module.plan, module.optimizer)
    optimizer = build_optimizer(groups, module.optimizer)

    def step() -> None:
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()  # as Lightning's closure: between forward and backward
        loss.backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
        step()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    weights = sum(p.numel() * p.element_size() for p in module.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in module.trainable.values())
    return weights + 2 * trained + peak


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that tensors outweigh what surrounds them."""
    return build_tiny("llava", tmp_path_factory.mktemp("wide") / "llava", layers=6, hidden=128)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_peak_is_foretold(policy: str, checkpointing: bool, wide: Path, data: Data) -> None:
    """Within 15 %."""
    batch = batch_of(wide, data, 4)
    found = foretold(wide, POLICIES[policy], batch, RunSettings(checkpointing=checkpointing)).memory.total
    assert found == pytest.approx(measured(wide, POLICIES[policy], batch, checkpointing), rel=0.15)


@pytest.mark.skipif(not (NANO / "model/config.json").is_file(), reason="the nano model is not made")
@pytest.mark.parametrize("policy", [Full(), IntermediateOnly(layers="8-15"), LoRAOnMiddle(layers="8-15")])
def test_peak_of_the_nano_model_is_foretold(policy: TuningPolicy) -> None:
    """Within 15 %."""
    batch = batch_of(NANO / "model", {"train": NANO / "data/train.json"}, 4)
    assert foretold(NANO / "model", policy, batch).memory.total == pytest.approx(
        measured(NANO / "model", policy, batch), rel=0.15
    )


def test_causes_follow_their_options(wide: Path, data: Data) -> None:
    batch = batch_of(wide, data, 4)
    blueprint = MetaModel(Backbone(path=str(wide)), batch)

    def memory(setting: RunSettings, policy: TuningPolicy = POLICIES["layers"]) -> CostEstimate:
        return estimate_cost(blueprint, policy, [batch], setting, DEVICES["h200"])

    plain, ranks = memory(RunSettings()), memory(RunSettings(ranks=4))
    assert ranks.memory.gradients == 2 * plain.memory.gradients
    assert (plain.traffic, ranks.traffic) == (0, 1.5 * plain.memory.gradients)
    assert plain.checkpoint == plain.memory.gradients + plain.memory.optimizer == 3 * plain.memory.gradients
    eight = memory(RunSettings(optimizer="adamw8bit")).memory.optimizer
    assert plain.memory.optimizer / 4 < eight < plain.memory.optimizer / 3
    mixed = memory(RunSettings(bf16=True))
    assert mixed.memory.weights < plain.memory.weights
    assert mixed.memory.activations < 0.8 * plain.memory.activations
    assert mixed.flops.floor == pytest.approx(plain.flops.floor)
    less = memory(RunSettings(checkpointing=True))
    assert less.memory.activations < plain.memory.activations
    assert less.run > plain.run >= plain.flops.floor == less.flops.floor
    # And back again: the skeleton that is shared between policies forgets what was done to it.
    assert memory(RunSettings()).memory == plain.memory
    assert memory(RunSettings(), POLICIES["lora"]).memory.optimizer < plain.memory.optimizer / 5


def test_quantisation_is_of_frozen_linear_weights(family: Family, data: Data) -> None:
    folder = family("llava")
    batch = batch_of(folder, data)
    found = {}
    for kind in ("none", "int8", "nf4"):
        backbone = Backbone(path=str(folder), quantization=kind)  # type: ignore[arg-type]
        found[kind] = estimate_cost(
            MetaModel(backbone, batch), POLICIES["layers"], [batch], RunSettings(), DEVICES["h200"]
        )
    weights = {kind: one.memory.weights for kind, one in found.items()}
    assert weights["nf4"] < weights["int8"] < weights["none"]
    trained = {one.memory.gradients for one in found.values()}
    assert len(trained) == 1
    assert weights["nf4"] > trained.pop()


def test_a_prefix_that_trains_is_not_cached(family: Family, data: Data) -> None:
    folder = family("llava")
    batch = batch_of(folder, data)
    full, late = foretold(folder, Full(), batch), foretold(folder, IntermediateOnly(layers="last:1"), batch)
    every = foretold(folder, Full(vision="full"), batch)
    assert every.cached is None
    assert "vision" in every.uncached_because.lower()
    assert full.cached is not None
    assert full.cached > 0.9 * full.run, "only the tower is saved"
    assert late.cached is not None
    assert late.cached < 0.6 * late.run
    assert late.record > 0


def test_small_tensors_keep_whole_states(family: Family) -> None:
    linear = torch.nn.Linear(64, 64)
    assert optimizer_bytes(linear, "adamw") == 2 * 4 * (64 * 64 + 64)
    assert optimizer_bytes(linear, "adamw8bit") == 2 * 64 * 64 * (1 + 4 / 256) + 2 * 4 * 64
