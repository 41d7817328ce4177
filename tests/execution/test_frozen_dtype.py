"""Frozen weights held in bfloat16 change no bit of a bf16-mixed run."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mm.callbacks import CausalCallback, DriftCallback, GeometryCallback, ProbingCallback, Schedule
from lightning_mm.core.errors import UserError
from lightning_mm.core.layer_table import read_layers
from lightning_mm.data.batch import Batch
from lightning_mm.execution.frozen_dtype import cast_frozen_weights, castable_weights
from lightning_mm.execution.prepare import Compute
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout, plain_name
from lightning_mm.testing.tiny import FAMILIES
from lightning_mm.training.callbacks.evaluation import HeldOutEvaluation
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import ConnectorOnly, IntermediateOnly, LoRA, LoRAOnMiddle, TuningPolicy
from lightning_mm.tuning.apply import apply_policy
from tests.helpers.data import Data, Family, batch_of
from tests.helpers.mixtures import build
from tests.helpers.training import Losses, configured, train

MIDDLE = IntermediateOnly(layers="1-2")


def step(module: MMModule, batch: Batch) -> dict[str, Tensor]:
    """Loss, logits and gradients of one step under autocast."""
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        objective = module.objective(batch)
        with torch.no_grad():
            logits = module.model(**batch.inputs).logits
    objective.nll.backward()
    found = {"loss": objective.nll.detach(), "logits": logits}
    for name, parameter in module.trainable.items():
        assert parameter.grad is not None
        found[name], parameter.grad = parameter.grad, None
    return found


@pytest.mark.parametrize(
    ("name", "tuning"),
    [
        *((name, MIDDLE) for name in sorted(FAMILIES)),
        ("llava", LoRAOnMiddle(layers="1-2", lora=LoRA(r=4, dropout=0.1))),
        ("gemma3", LoRAOnMiddle(layers="1-2", lora=LoRA(r=4, dora=True))),
        ("qwen3_vl", ConnectorOnly()),
    ],
)
def test_no_bit_changes(name: str, tuning: TuningPolicy, family: Family, data: Data) -> None:
    module, batch = configured(family(name), tuning), batch_of(family(name), data)
    expected = step(module, batch)
    saved = cast_frozen_weights(module.mm, module.plan, "bf16-mixed", ExitStack())
    head = module.model.get_submodule(module.mm.layout.head)
    copy = head.weight.nbytes // 2 if "forward" in head.__dict__ else 0
    assert ("forward" in head.__dict__) == module.mm.layout.tied_head
    assert saved == sum(p.nbytes for p in module.parameters() if p.dtype == torch.bfloat16) - copy
    found = step(module, batch)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


def test_only_frozen_linear_weights_that_nothing_else_reads(family: Family, data: Data) -> None:
    module = configured(family("gemma3"), MIDDLE)  # its head is tied to its embedding
    cast_frozen_weights(module.mm, module.plan, "bf16-mixed", ExitStack())
    owners = dict(module.model.named_modules())
    tied = module.model.get_input_embeddings().weight
    for name, parameter in module.model.named_parameters():
        linear = isinstance(owners[name.rpartition(".")[0]], nn.Linear)
        expected = linear and not parameter.requires_grad and parameter is not tied
        assert (parameter.dtype == torch.bfloat16) == expected, name
    assert module.model.dtype == torch.float32


def test_under_dora_the_weights_stay(family: Family) -> None:
    module = configured(family("llava"), LoRAOnMiddle(layers="1-2", lora=LoRA(r=4, dora=True)))
    held = {id(parameter) for parameter in castable_weights(module.model, module.plan)}
    for name, parameter in module.model.named_parameters():
        assert not (name.endswith(".base_layer.weight") and id(parameter) in held), name


def test_nothing_is_cast_where_autocast_is_not(family: Family) -> None:
    module = configured(family("llava"), MIDDLE)
    assert cast_frozen_weights(module.mm, module.plan, "32-true", ExitStack()) == 0
    assert cast_frozen_weights(module.mm, module.plan, "bf16-mixed", ExitStack(), "float32") == 0
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    with pytest.raises(UserError, match=r"does not go with trainer\.precision 32-true"):
        cast_frozen_weights(module.mm, module.plan, "32-true", ExitStack(), "bfloat16")


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_whole_run_is_the_same(name: str, family: Family, data: Data, tmp_path: Path) -> None:
    """Training, validation by loss and by answers, and questions before and after: all bits, through the trainer."""
    runs = []
    for wanted in ("float32", "auto"):
        losses = Losses()
        module, trainer = train(
            family(name),
            data,
            tmp_path,
            tuning=MIDDLE,
            compute=Compute(frozen_dtype=wanted),
            precision="bf16-mixed",
            max_steps=4,
            limit_val_batches=1.0,
            val_check_interval=2,
            callbacks=[losses, HeldOutEvaluation()],
        )
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        assert metrics
        runs.append((module, losses.by_step, metrics))
    (plain, *expected), (held, *found) = runs
    assert found == expected
    assert plain.base == held.base
    assert any(p.dtype == torch.bfloat16 for p in held.parameters())
    assert not any(p.dtype == torch.bfloat16 for p in plain.parameters())
    for key, parameter in plain.trainable.items():
        assert torch.equal(parameter, held.trainable[key]), key


def test_whoever_looks_sees_the_same(family: Family, data: Data, probes: Path, tmp_path: Path) -> None:
    """Attention flow alone reads weights itself, in float32: 2^-8 of rounding there."""
    found: list[dict[tuple[object, ...], float]] = []
    for wanted in ("float32", "auto"):
        every = Schedule(every=2, budget=None)
        causal = CausalCallback(every, count=3, parts=("ablation", "knockout", "flow", "trace"))
        looking = [ProbingCallback(every), GeometryCallback(every), DriftCallback(every), causal]
        options = {"tuning": MIDDLE, "max_steps": 2, "precision": "bf16-mixed", "callbacks": looking}
        folder = tmp_path / wanted
        train(family("llava"), {**data, "probes": probes}, folder, compute=Compute(frozen_dtype=wanted), **options)
        rows, bad = read_layers(folder / "layers.csv")
        assert not bad
        found.append({(r.step, r.analysis, r.measure, r.site, r.layer): r.value for r in rows if r.value is not None})
    plain, held = found
    assert plain.keys() == held.keys()
    assert {key[1] for key in plain} >= {"causal", "probing", "geometry", "drift"}
    for key, value in plain.items():
        assert held[key] == pytest.approx(value, abs=2e-2 if key[2] == "flow" else 0.0), key


class Casts(TorchDispatchMode):
    """Counts how often a tensor of a shape is cast."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


def test_the_copy_of_a_tied_head_is_made_once(family: Family, data: Data) -> None:
    """Also where it was made in inference mode, as by a validation before training; other weights make another one."""
    module, batch = configured(family("gemma3"), MIDDLE), batch_of(family("gemma3"), data)
    table = module.model.get_input_embeddings().weight
    assert module.mm.layout.tied_head
    cast_frozen_weights(module.mm, module.plan, "bf16-mixed", ExitStack())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        module.objective(batch_of(family("gemma3"), data))
    with Casts(table.shape) as casts:
        found = step(module, batch)
    assert casts.count == 0
    assert table.dtype == torch.float32
    with torch.no_grad():
        table.mul_(2)
    assert not torch.equal(step(module, batch)["logits"], found["logits"])
    hidden = torch.rand(2, table.shape[1])
    # Without autocast, the float32 weight itself.
    assert torch.equal(module.model.get_output_embeddings()(hidden), nn.functional.linear(hidden, table))


@pytest.mark.parametrize("name", ["llama4", "qwen3_vl_moe"])
def test_experts_one_at_a_time_are_the_same_to_the_bit(name: str) -> None:
    """And what adapters are added to keeps its dtype."""
    ids = torch.arange(10, 30)[None]
    cases = {torch.bfloat16: IntermediateOnly(layers="1", parts=["attention"]), torch.float32: LoRAOnMiddle(layers="1")}
    for dtype, policy in cases.items():
        model = build(name)
        layout = ModelLayout.of(model)
        if name == "qwen3_vl_moe":
            model.set_experts_implementation("eager")
        mm, plan = MultimodalModel(model, layout), apply_policy(model, policy)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = model(input_ids=ids).logits
            cast_frozen_weights(mm, plan, "bf16-mixed", ExitStack())
            assert torch.equal(model(input_ids=ids).logits, expected)
        stacks = [p for n, p in model.named_parameters() if plain_name(n) in layout.stacks and ".layers.1." in n]
        assert {p.dtype for p in stacks} == {dtype}
