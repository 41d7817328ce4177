"""Gradients do not depend on how a batch is cut: micro-batches, ranks, text-only parts."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_mm.core.errors import UserError
from lightning_mm.tuning import ConnectorOnly, Full, IntermediateOnly, TuningPolicy
from lightning_mm.tuning.optimizer import OptimizerSettings
from tests.helpers.data import Family, make_rows
from tests.helpers.training import train


class Gradients(Callback):
    """Keeps the gradients of the first optimizer step, as the optimizer gets them."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.loss = 0.0

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == 1 and not self.kept:
            self.kept = {n: p.grad.clone() for n, p in pl_module.trainable.items() if p.grad is not None}
            self.loss = float(trainer.callback_metrics["train/loss"])


def first_step(
    model: Path, data: dict[str, Path], folder: Path, size: int, accumulate: int, tuning: TuningPolicy
) -> Gradients:
    kept = Gradients()
    train(
        model,
        data,
        folder,
        tuning=tuning,
        batch_size=size,
        accumulate_grad_batches=accumulate,
        max_steps=2,
        callbacks=[kept],
        optimizer=OptimizerSettings(lr=1e-12),
    )
    return kept


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_accumulation_does_not_change_the_gradient(name: str, family: Family, tmp_path: Path) -> None:
    """1e-6: fp32 sums in another order. Four conversations of uneven length, cut into 1, 2 and 4 micro-batches."""
    train_file = tmp_path / "train.json"
    train_file.write_text(json.dumps(make_rows(tmp_path, 4)))
    data = {"train": train_file}
    whole = first_step(family(name), data, tmp_path, 4, 1, IntermediateOnly(layers="1-2"))
    assert whole.kept
    for size, accumulate in ((2, 2), (1, 4)):
        cut = first_step(family(name), data, tmp_path, size, accumulate, IntermediateOnly(layers="1-2"))
        assert cut.loss == pytest.approx(whole.loss, abs=1e-6)
        assert cut.kept.keys() == whole.kept.keys()
        for parameter, gradient in whole.kept.items():
            torch.testing.assert_close(cut.kept[parameter], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("policy", [ConnectorOnly(), Full()])
def test_text_only_conversations_train_beside_pictures(policy: TuningPolicy, family: Family, tmp_path: Path) -> None:
    """A batch without pictures gives the connector a zero gradient, not none, so that no rank waits for it."""
    rows = make_rows(tmp_path, 2) + make_rows(tmp_path, 2, seed=1, text_only=True)
    data = {"train": tmp_path / "train.json"}
    data["train"].write_text(json.dumps(rows))
    module, trainer = train(family("llava"), data, tmp_path, tuning=policy, batch_size=1, max_steps=4)
    assert trainer.global_step == 4
    assert all(torch.isfinite(p).all() for p in module.trainable.values())


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(
    family: Family, data: dict[str, Path], tmp_path: Path
) -> None:
    before: dict[str, Tensor] = {}

    def poison(module) -> None:  # type: ignore[no-untyped-def]
        head = module.model.get_submodule(module.mm.layout.head)
        head.weight.data[0, 0] = float("inf")
        before.update({n: p.detach().clone() for n, p in module.trainable.items()})

    held = []
    with pytest.raises(UserError, match="not finite"):
        train(
            family("llava"),
            data,
            tmp_path,
            tuning=IntermediateOnly(layers="1"),
            max_steps=2,
            on_start=lambda module: (poison(module), held.append(module))[0],
        )
    assert all(torch.equal(p, before[n]) for n, p in held[0].trainable.items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_works_with_fused_adamw_in_every_precision(
    precision: str, family: Family, data: dict[str, Path], tmp_path: Path
) -> None:
    """The first moment after one step is a tenth of the clipped gradient. 1e-5: the norm is taken in fp32."""
    options = {"precision": precision, "gradient_clip_val": 1e-3, "max_steps": 1}
    _, trainer = train(family("llava"), data, tmp_path, tuning=IntermediateOnly(layers="1-2"), **options)
    moments = [state["exp_avg"] * 10 for state in trainer.optimizers[0].state.values()]
    assert float(trainer.callback_metrics["train/grad_norm"]) > 1e-3
    assert float(torch.nn.utils.get_total_norm(moments)) == pytest.approx(1e-3, rel=1e-5)


def test_8bit_adamw_trains_and_its_state_loads_without_pickle(
    family: Family, data: dict[str, Path], tmp_path: Path
) -> None:
    settings = OptimizerSettings(name="adamw8bit", lr=1e-3)
    module, trainer = train(family("llava"), data, tmp_path, optimizer=settings, tuning=Full(), max_steps=3)
    trainer.save_checkpoint(tmp_path / "8bit.ckpt")
    saved = torch.load(tmp_path / "8bit.ckpt", weights_only=True)
    states = saved["optimizer_states"][0]["state"].values()
    # bitsandbytes keeps tensors below 4096 values in 32 bits.
    assert {state["__bnb_optimizer_quant_state__"]["state1"].dtype for state in states} == {torch.uint8, torch.float32}
    assert set(saved["state_dict"]) == set(module.trainable)
