"""What must hold on every device: on the CPU, and on CUDA where there is one (``scripts/gpu_suite.py``)."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.callbacks import CausalCallback, DriftCallback, GeometryCallback, ProbingCallback, Schedule
from lightning_mm.execution.cache.activation_cache import CacheSettings
from lightning_mm.models.loading import Backbone
from lightning_mm.testing.tiny import build_tiny
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import IntermediateOnly, LoRA, LoRAOnMiddle, TuningPolicy
from lightning_mm.tuning.optimizer import OptimizerSettings, build_optimizer, parameter_groups
from tests.helpers.data import Family, batch_of
from tests.helpers.training import Losses, losses_of, train

DEVICES = ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))
EVERY = Schedule(every=2, budget=None)
MIDDLE = IntermediateOnly(layers="1-2", connector="full")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device whose sums have one order."""
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    held = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param == "cuda", warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(held)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Rows of whole blocks of 64 values, as NF4 wants them."""
    return cache(lambda name: build_tiny(name, tmp_path_factory.mktemp("wide") / name, hidden=64))


def accelerator(device: str) -> str:
    return "gpu" if device == "cuda" else "cpu"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_losses_are_those_of_the_cpu_in_float32(
    name: str, precision: str, device: str, family: Family, data: dict[str, Path], tmp_path: Path
) -> None:
    """Over six steps. float32 differs by the order of sums; bfloat16 has 8 bits, and six steps of 1e-2 spread them."""
    found = []
    for where, width in (("cpu", "32-true"), (device, precision)):
        losses = Losses()
        options: dict[str, Any] = {"max_steps": 6, "precision": width, "accelerator": accelerator(where)}
        train(family(name), data, tmp_path, tuning=MIDDLE, callbacks=[losses], **options)
        found.append(torch.tensor(list(losses.by_step.values())))
    tolerance = 1e-3 if precision == "32-true" else 5e-2
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("policy", [MIDDLE, LoRAOnMiddle(layers="1-2", lora=LoRA(r=4))], ids=["layers", "lora"])
def test_a_model_in_nf4_learns(policy: TuningPolicy, device: str, wide: Family, data: dict[str, Path]) -> None:
    module = MMModule(Backbone(path=str(wide("llava")), quantization="nf4"), policy, OptimizerSettings(lr=1e-2))
    module.configure_model()
    module.to(device)
    groups = parameter_groups(module.mm, module.plan, module.optimizer)
    optimizer = build_optimizer(groups, module.optimizer)
    batch = batch_of(wide("llava"), data).to(device)
    losses = losses_of(module, batch, optimizer, 8)
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_looking_inside_leaves_training_bit_identical(
    precision: str, device: str, family: Family, data: dict[str, Path], probes: Path, tmp_path: Path
) -> None:
    """Probes, geometry, drift and causal traces."""
    plain, watched = Losses(), Losses()
    options: dict[str, Any] = {"max_steps": 4, "precision": precision, "accelerator": accelerator(device)}
    options |= {"tuning": MIDDLE}
    alone, _ = train(family("llava"), data, tmp_path, callbacks=[plain], **options)
    looks = [ProbingCallback(EVERY), GeometryCallback(EVERY), DriftCallback(EVERY)]
    looks += [CausalCallback(EVERY, count=2, parts=("ablation",))]
    probed = {**data, "probes": probes}
    seen, _ = train(family("llava"), probed, tmp_path / "run", callbacks=[watched, *looks], **options)
    assert watched.by_step == plain.by_step
    for name, parameter in alone.trainable.items():
        assert torch.equal(parameter, seen.trainable[name]), name
    assert (tmp_path / "run" / "layers.csv").is_file()


def test_kept_states_give_the_same_losses(device: str, family: Family, data: dict[str, Path], tmp_path: Path) -> None:
    """The frozen prefix computed, and read; on CUDA other kernels sum in another order."""
    found = []
    for mode in ("off", "on", "on"):
        losses = Losses()
        kept = CacheSettings(mode=mode, folder=str(tmp_path / "states"))
        policy = IntermediateOnly(layers="2")
        options: dict[str, Any] = {"max_steps": 6, "accelerator": accelerator(device), "cache": kept}
        train(family("llava"), data, tmp_path, tuning=policy, callbacks=[losses], **options)
        found.append(torch.tensor(list(losses.by_step.values())))
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-5, atol=1e-5)
