"""Rows that share pictures train as each alone does: losses and gradients of every family; else they are refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mm import Full, IntermediateOnly, MMDataModule
from lightning_mm.core.errors import UserError
from lightning_mm.data import shared_images
from lightning_mm.data.batch import Batch
from lightning_mm.execution.prepare import Compute
from lightning_mm.execution.shared_images import EqualPictures
from lightning_mm.execution.step import TrainingStep
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone
from lightning_mm.planning.step_shape import StepShape
from lightning_mm.testing.tiny import FAMILIES
from lightning_mm.training.module import MMModule
from lightning_mm.tuning.apply import prepare_model
from lightning_mm.tuning.policy import TuningPolicy
from tests.helpers.data import Family
from tests.helpers.shared_rows import module, write_rows
from tests.helpers.training import cache_on, train_losses


def prepared(folder: Path, data: MMDataModule, policy: TuningPolicy, **options: Any) -> TrainingStep:
    mm, plan = prepare_model(Backbone(str(folder)), policy, None)
    step = TrainingStep(MultimodalModel.of(mm.model, data.processing), plan, Compute(), False, **options)
    step.mm.model.eval()
    return step


def trained(step: TrainingStep, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    step.mm.model.zero_grad()
    found = step.objective(batch)
    found.nll.backward()
    gradients = {n: p.grad.clone() for n, p in step.mm.model.named_parameters() if p.grad is not None}
    return found.token_nll, gradients


def one_by_one(step: TrainingStep, data: MMDataModule, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Transformers' own loss of each row alone, summed over supervised tokens, and its gradients."""
    step.mm.model.zero_grad()
    total = 0.0
    for sample in batch.samples:
        row = data.collator()([sample])
        labels = torch.full_like(row.inputs["input_ids"], -100)
        labels.flatten()[row.supervised + 1] = row.targets
        loss = step.mm.model(**row.inputs, labels=labels, use_cache=False).loss * row.num_supervised
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in step.mm.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_losses_and_gradients_are_those_of_rows_alone(name: str, family: Family, tmp_path: Path) -> None:
    """Loss to 1e-5 of itself, gradients to 1e-4 of their norm: float32 sums over tokens in another order."""
    data = module(write_rows(tmp_path, [3, 1, 4]), family(name), batch_size=3)
    step = prepared(family(name), data, Full())
    (batch,) = data.train_dataloader()
    assert batch.shared is not None
    expected, gradients = one_by_one(step, data, batch)
    found, own = trained(step, batch)
    assert float(found.sum()) == pytest.approx(expected, rel=1e-5)
    assert own.keys() == gradients.keys()
    for key, value in gradients.items():
        assert (own[key] - value).norm() <= 1e-4 * value.norm() + 1e-7, key
    step.verify_sharing(batch)
    step.close()


@pytest.fixture
def llava(family: Family, tmp_path: Path) -> Iterator[tuple[TrainingStep, Batch]]:
    data = module(write_rows(tmp_path, [3, 2]), family("llava"), batch_size=2)
    step = prepared(family("llava"), data, IntermediateOnly([1]))
    (batch,) = data.train_dataloader()
    yield step, batch
    step.close()


def test_the_tower_sees_each_picture_once(llava: tuple[TrainingStep, Batch]) -> None:
    step, batch = llava
    seen: list[int] = []
    tower: Any = step.mm.transformers.get_encoder(modality="image")
    patches = next(m for m in tower.modules() if isinstance(m, torch.nn.Conv2d))
    patches.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    step.objective(batch)
    step.objective(replace(batch, shared=None))
    assert seen == [2, 5]


def test_blocks_see_what_is_shared_once(llava: tuple[TrainingStep, Batch]) -> None:
    step, batch = llava
    seen: list[int] = []
    mlp = step.mm.model.get_submodule(step.mm.layout.layers[0]).mlp  # type: ignore[union-attr]
    mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))  # type: ignore[union-attr,operator]
    step.objective(batch)
    assert seen == [len(batch.real)]
    assert StepShape.of(batch).tokens == len(batch.real)
    assert StepShape.of(batch).pixels == pytest.approx(StepShape.of(replace(batch, shared=None)).pixels * 2 / 5)


def test_a_block_that_looks_ahead_is_refused(llava: tuple[TrainingStep, Batch]) -> None:
    """A decoder block that adds the mean over its row to every token, as attention in both directions would."""
    step, batch = llava
    block = step.mm.model.get_submodule(step.mm.layout.layers[0])

    def ahead(_: Any, __: Any, output: Any) -> Any:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        mixed = hidden + hidden.mean(1, keepdim=True)
        return mixed if isinstance(output, torch.Tensor) else (mixed, *output[1:])

    handle = block.register_forward_hook(ahead)
    with pytest.raises(UserError, match=r"What leaves block 0 for a picture depends on the question behind it"):
        step.verify_sharing(batch)
    handle.remove()
    step.verify_sharing(batch)


def test_without_packing_it_is_refused(family: Family, tmp_path: Path) -> None:
    data = module(write_rows(tmp_path, [3]), family("llava"), batch_size=1)
    mm, plan = prepare_model(Backbone(str(family("llava"))), Full(), None)
    step = TrainingStep(MultimodalModel.of(mm.model, data.processing), plan, Compute(packing=False), False)
    with pytest.raises(UserError, match=r"data\.share_images is not possible here"):
        step.verify_sharing(next(iter(data.train_dataloader())))
    step.close()


@given(st.lists(st.integers(0, 3), max_size=12))
def test_equal_pictures(values: list[int]) -> None:
    pictures = [torch.full((2, 2), float(value)) for value in values]
    equal = EqualPictures.of(pictures)
    assert [values[equal.first[u]] for u in equal.inverse] == values
    assert len(equal.first) == len(set(values))


@pytest.mark.parametrize("tuning", [IntermediateOnly([2]), IntermediateOnly([2], connector="full")])
def test_runs_with_shared_pictures_and_a_cache_equal_one_without(
    tuning: TuningPolicy, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefix cache or feature cache, filled and read again; losses to 1e-5 of themselves: float32, the same batches.

    While it is filled, the tower sees each of the four pictures once.
    """
    data = {"train": write_rows(tmp_path, [3, 1, 4, 2])}
    options: dict[str, Any] = {"tuning": tuning, "data_options": {"share_images": True}}
    seen: list[int] = []

    def count(module: MMModule) -> None:
        block = module.model.get_submodule(module.mm.layout.vision_blocks[0])
        block.mlp.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))

    filled, _ = train_losses(family("llava"), data, tmp_path, cache=cache_on(tmp_path), on_start=count, **options)
    assert seen == [1] * 4
    known, _ = train_losses(family("llava"), data, tmp_path, cache=cache_on(tmp_path), **options)
    assert known == filled
    monkeypatch.setattr(shared_images, "share_prefixes", lambda batch: batch)
    apart, _ = train_losses(family("llava"), data, tmp_path, **options)
    assert filled == pytest.approx(apart, rel=1e-5)
