"""A prepared step computes the family's own losses; what does not is found on rows of the run and switched off."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mm import IntermediateOnly
from lightning_mm.core.errors import UserError
from lightning_mm.data import example_batches
from lightning_mm.data.batch import Batch
from lightning_mm.data.collator import Collator
from lightning_mm.data.example_batches import mixed_batch
from lightning_mm.data.readers.conversations import read_conversations
from lightning_mm.execution import loss, step_proof
from lightning_mm.execution import step as execution_step
from lightning_mm.execution.prepare import Compute
from lightning_mm.execution.step import TrainingStep
from lightning_mm.models.attention import cpu_kernels
from lightning_mm.models.loading import Backbone
from lightning_mm.models.processor import load_processor
from lightning_mm.tuning.apply import prepare_model
from tests.helpers.data import Family, make_uneven_rows

Prepared = Callable[..., tuple[TrainingStep, Batch]]


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a step says, each as often as it says it."""
    said: list[str] = []
    monkeypatch.setattr(execution_step, "log_decision", lambda *given: said.append(": ".join(map(str, given))))
    return said


@pytest.fixture
def prepared(family: Family, tmp_path: Path) -> Iterator[Prepared]:
    """A step of a tiny model whose layers 1 and 2 train, and a padded batch; ``change`` gets the model before."""
    steps = []

    def make(name: str, precision: str | None = None, change: Callable[[Any], None] = lambda _: None) -> Any:
        mm, plan = prepare_model(Backbone(str(family(name))), IntermediateOnly("1-2"), None)
        change(mm)
        samples = read_conversations(make_uneven_rows(tmp_path, text_only=True)).samples
        batch = mixed_batch(samples, Collator(load_processor(str(family(name)))))
        assert batch is not None
        assert len(batch.real) < batch.regions.numel()
        assert {len(sample.images) for sample in batch.samples} == {0, 1}
        steps.append(TrainingStep(mm, plan, Compute(), False, precision))
        return steps[-1], batch

    yield make
    for step in steps:
        step.close()


def losses(step: TrainingStep, batch: Batch) -> Tensor:
    with torch.enable_grad():
        return step.objective(batch).token_nll


def own_losses(step: TrainingStep, batch: Batch) -> Tensor:
    """Of each supervised token, by transformers alone."""
    with torch.no_grad():
        logits = step.mm.model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.supervised]
    return F.cross_entropy(logits, batch.targets, reduction="none")


@pytest.mark.parametrize("precision", [None, "bf16-mixed"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "idefics3"])
def test_what_is_right_stays_on(name: str, precision: str | None, prepared: Prepared, decisions: list[str]) -> None:
    step, batch = prepared(name, precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
        step.prove(batch)
    assert step.compute == Compute()
    assert not decisions


def sees_the_token_before(mm: Any) -> None:
    """Block 1 mixes as a causal convolution does: on rows side by side, into the next row."""
    norm = mm.model.get_submodule(mm.layout.layers[1]).input_layernorm
    norm.register_forward_hook(lambda _, __, out: out + F.pad(out[:, :-1], (0, 0, 1, 0)))


def needs_rows(mm: Any) -> None:
    """Block 1 cannot run on one long row."""

    def refuse(_: Any, args: tuple[Tensor]) -> None:
        if args[0].shape[0] == 1:
            raise RuntimeError("one row too long")

    mm.model.get_submodule(mm.layout.layers[1]).input_layernorm.register_forward_pre_hook(refuse)


@pytest.mark.parametrize("precision", [None, "bf16-mixed"])
@pytest.mark.parametrize(
    ("fault", "said"), [(sees_the_token_before, "differs by"), (needs_rows, "cannot run without padding: one row")]
)
def test_a_block_that_mixes_rows_stays_padded(
    fault: Any, said: str, precision: str | None, prepared: Prepared, decisions: list[str]
) -> None:
    step, batch = prepared("llava", precision, fault)
    name = step.mm.layout.layers[1]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
        step.prove(batch)
    (told,) = decisions
    assert f"{name} stays padded" in told
    assert said in told
    if precision is None:
        found = losses(step, batch)
        step.close()
        # float32 sums in another order.
        torch.testing.assert_close(found, own_losses(step, batch), rtol=1e-5, atol=1e-5)


def test_a_wrong_kernel_is_switched_off(prepared: Prepared, monkeypatch: Any, decisions: list[str]) -> None:
    """A kernel that is wrong alike with and without padding shows in the losses only."""
    fold = cpu_kernels._fold_heads
    monkeypatch.setattr(cpu_kernels, "_fold_heads", lambda *given: fold(*given).mul_(1.05))
    step, batch = prepared("llava")
    step.prove(batch)
    assert (step.compute.cpu_kernels, step.compute.packing) == (False, True)
    assert [told.partition(": with")[0] for told in decisions] == ["model.compute.cpu_kernels: off"]
    found = losses(step, batch)
    step.close()
    torch.testing.assert_close(found, own_losses(step, batch), rtol=1e-5, atol=1e-5)


def test_where_logits_of_all_positions_are_too_many_supervised_ones_are_compared(
    prepared: Prepared, monkeypatch: Any, decisions: list[str]
) -> None:
    monkeypatch.setattr(step_proof, "_MOST_LOGITS", 0)
    step, batch = prepared("llava")
    nll, largest, whole = step_proof.plain_token_nll(step.mm, batch)
    assert not whole
    assert largest > 0
    step.prove(batch)
    assert not decisions
    step.close()
    # float32 sums in another order.
    torch.testing.assert_close(nll, own_losses(step, batch), rtol=1e-5, atol=1e-5)


def test_a_lack_of_memory_says_nothing_of_a_block(prepared: Prepared) -> None:
    def refuse(_: Any, args: tuple[Tensor]) -> None:
        if args[0].shape[0] == 1:
            raise torch.OutOfMemoryError("no memory")

    def plant(mm: Any) -> None:
        mm.model.get_submodule(mm.layout.layers[1]).input_layernorm.register_forward_pre_hook(refuse)

    step, batch = prepared("llava", None, plant)
    with pytest.raises(torch.OutOfMemoryError):
        step.prove(batch)


def test_rows_differ_and_the_longest_are_left_out(family: Family, tmp_path: Path, monkeypatch: Any) -> None:
    samples = read_conversations(make_uneven_rows(tmp_path, text_only=True)).samples
    collator = Collator(load_processor(str(family("llava"))))
    whole = mixed_batch(samples, collator)
    assert whole is not None
    lengths = (whole.regions != 0).sum(1)
    assert {len(sample.images) for sample in whole.samples} == {0, 1}
    monkeypatch.setattr(example_batches, "_MOST_TOKENS", whole.regions.numel() - 1)
    smaller = mixed_batch(samples, collator)
    assert smaller is not None
    gone = [number for number, sample in enumerate(whole.samples) if sample not in smaller.samples]
    assert gone[0] == int(lengths.argmax())
    monkeypatch.setattr(example_batches, "_MOST_TOKENS", 1)
    least = mixed_batch(samples, collator)
    assert least is not None
    assert len(least) == 2
    assert mixed_batch([], collator) is None


def test_a_wrong_loss_is_refused(prepared: Prepared, monkeypatch: Any) -> None:
    """Logits of the token after the right one: nothing that can be switched off explains it."""
    select = loss.select_positions_before_head

    @contextmanager
    def shifted(head: Any, positions: Tensor) -> Iterator[None]:
        with select(head, positions + 1 if len(positions) else positions):
            yield

    monkeypatch.setattr(loss, "select_positions_before_head", shifted)
    step, batch = prepared("llava")
    with pytest.raises(UserError, match="does not compute this model's loss"):
        step.prove(batch)


def test_nothing_of_the_model_is_changed(prepared: Prepared) -> None:
    step, batch = prepared("llava")
    before = {name: tensor.clone() for name, tensor in step.mm.model.state_dict().items()}
    drawn = torch.get_rng_state()
    step.prove(batch)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in step.mm.model.state_dict().items())
    assert all(parameter.grad is None for parameter in step.mm.model.parameters())
