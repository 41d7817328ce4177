"""The training order depends on (seed, epoch) alone and is taken up where it stopped; evaluation sees each sample once.

The resume tests run Lightning's own trainer, killed and started again, against the run that nobody killed.
"""

import os
import signal
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_mm.core.errors import UserError
from lightning_mm.data.dataloader import (
    CheckedDataLoader,
    EpochSampler,
    ResumableDataLoader,
    ShardSampler,
    evaluation_loader,
    training_loader,
)

NUM_SAMPLES, BATCH, EPOCHS = 10, 2, 3
PER_EPOCH = NUM_SAMPLES // BATCH

# Lightning's advice on numbers of workers and on logging is not what is tested; that it calls a deprecated torch class
# is Lightning's own to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]


class Killed(Exception):
    pass


class Recorder(L.LightningModule):
    """Fits one weight to the ids it is given, and writes down which those were."""

    def __init__(self, break_in_step: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, list[int]]] = []
        self.break_in_step = break_in_step

    def training_step(self, batch: list[int], batch_idx: int) -> Tensor:
        if self.break_in_step == len(self.seen):
            raise Killed
        self.seen.append((self.current_epoch, batch_idx, batch))
        return ((self.weight - torch.tensor(batch, dtype=torch.float32)) ** 2).mean()

    def validation_step(self, batch: list[int], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class KillAfter(L.Callback):
    """Save after so many batches, and die."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)
            raise Killed


class SaveWhenBroken(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def ids(rows: list[int]) -> list[int]:
    return rows


def loader(num_workers: int = 0, **changes: int) -> ResumableDataLoader:
    options = {"batch_size": BATCH, "seed": 3, "num_workers": num_workers, **changes}
    return training_loader(range(NUM_SAMPLES), ids, **options)


def fit(
    module: Recorder,
    folder: Path,
    callbacks: list[L.Callback] | None = None,
    ckpt: Path | None = None,
    *,
    workers: int = 0,
    accumulate: int = 1,
    **options: Any,
) -> Recorder:
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=callbacks,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"max_epochs": EPOCHS, "enable_checkpointing": False, **options},
    )
    train = loader(workers)
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    train.processed = lambda: int(progress.processed)
    trainer.fit(module, train, evaluation_loader(range(4), ids, batch_size=2), ckpt_path=ckpt, weights_only=True)
    return module


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("at", [2, 5, 6, 10, 12])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, workers: int, accumulate: int, at: int) -> None:
    whole = fit(Recorder(), tmp_path, accumulate=accumulate)
    assert len(whole.seen) == EPOCHS * PER_EPOCH
    first, second = Recorder(), Recorder()
    with pytest.raises(Killed):
        fit(first, tmp_path, [KillAfter(at, tmp_path / "k.ckpt")], workers=workers, accumulate=accumulate)
    fit(second, tmp_path, ckpt=tmp_path / "k.ckpt", workers=workers, accumulate=accumulate)
    assert first.seen + second.seen == whole.seen
    if at % PER_EPOCH % accumulate == 0 or at % PER_EPOCH == 0:  # no gradient was waiting for its second half
        assert torch.equal(second.weight, whole.weight)


def test_a_batch_that_broke_its_step_is_seen_again(tmp_path: Path) -> None:
    whole = fit(Recorder(), tmp_path)
    first, second = Recorder(break_in_step=7), Recorder()
    with pytest.raises(Killed):
        fit(first, tmp_path, [SaveWhenBroken(tmp_path / "k.ckpt")])
    fit(second, tmp_path, ckpt=tmp_path / "k.ckpt")
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.weight, whole.weight)


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": PER_EPOCH}, {"max_steps": 7}], ids=str)
def test_a_finished_run_is_prolonged(tmp_path: Path, limit: dict[str, Any]) -> None:
    whole = fit(Recorder(), tmp_path)
    keep = ModelCheckpoint(tmp_path, "k", save_top_k=-1, every_n_train_steps=limit.get("max_steps"))
    first = fit(Recorder(), tmp_path, [keep], enable_checkpointing=True, **limit)
    second = fit(Recorder(), tmp_path, ckpt=tmp_path / "k.ckpt")
    assert first.seen + second.seen == whole.seen


def test_validation_within_the_epoch_does_not_move_the_order(tmp_path: Path) -> None:
    whole = fit(Recorder(), tmp_path)
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    again = fit(Recorder(), tmp_path, [keep], val_check_interval=2, enable_checkpointing=True, max_epochs=2)
    assert again.seen == whole.seen[: 2 * PER_EPOCH]
    second = fit(Recorder(), tmp_path, ckpt=tmp_path / "step=7.ckpt", val_check_interval=2)
    assert second.seen == whole.seen[7:]


def test_another_order_is_refused_in_the_middle_of_an_epoch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    source = loader()
    batches = iter(source)
    next(batches)
    state = source.state_dict()
    for change in ({"seed": 4}, {"batch_size": 5}):
        with pytest.raises(UserError, match=next(iter(change))):
            loader(**change).load_state_dict(state)
    with monkeypatch.context() as other:
        other.setattr("lightning_mm.data.dataloader.rank_and_world_size", lambda: (0, 2))
        of_two_ranks = loader()
    with pytest.raises(UserError, match="world_size was 1, is 2"):
        of_two_ranks.load_state_dict(state)
    list(batches)
    loader(seed=4).load_state_dict(source.state_dict())


def test_nothing_touches_the_global_generators() -> None:
    before = torch.get_rng_state()
    list(loader())
    list(loader(num_workers=1))
    list(evaluation_loader(range(4), ids, batch_size=2))
    assert torch.equal(torch.get_rng_state(), before)


@settings(deadline=None)
@given(num=st.integers(1, 40), world=st.integers(1, 5), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_ranks_share_every_sample(num: int, world: int, seed: int, epoch: int) -> None:
    shares = []
    for rank in range(world):
        sampler = EpochSampler(num, seed, rank, world)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    assert len({len(share) for share in shares}) == 1
    counts = Counter(sample for share in shares for sample in share)
    assert set(counts) == set(range(num))
    assert sum(counts.values()) - num == -num % world
    evaluated = [sample for rank in range(world) for sample in ShardSampler(num, rank, world)]
    assert sorted(evaluated) == list(range(num))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = set()
    for seed in range(4):
        sampler = EpochSampler(30, seed)
        for epoch in range(4):
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 16


def test_fewer_samples_than_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mm.data.dataloader.rank_and_world_size", lambda: (0, 3))
    with pytest.raises(UserError, match="2 samples cannot be evaluated on 3 devices"):
        evaluation_loader(range(2), ids, batch_size=1)


def _kill_self(rows: list[int]) -> list[int]:
    if 7 in rows:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows


def test_a_killed_worker_is_told_in_the_users_terms() -> None:
    with pytest.raises(UserError, match="data worker was killed") as caught:
        list(evaluation_loader(range(NUM_SAMPLES), _kill_self, batch_size=2, num_workers=2))
    assert "num_workers" in caught.value.fix
    assert "shm" in caught.value.fix


def _refuse(rows: list[int]) -> list[int]:
    raise UserError(f"Row {rows[0]} is bad.", "It is a test.", "None.")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_workers_user_error_arrives_whole(workers: int) -> None:
    with pytest.raises(UserError, match=r"Row 0 is bad") as caught:
        list(evaluation_loader(range(4), _refuse, batch_size=2, num_workers=workers))
    assert caught.value.fix == "None."


def _break(rows: list[int]) -> list[int]:
    raise RuntimeError("some bug")


def test_other_errors_are_not_dressed_up() -> None:
    with pytest.raises(RuntimeError, match="some bug"):
        list(evaluation_loader(range(4), _break, batch_size=2))


def test_lightning_can_rebuild_loaders_for_prediction_and_overfitting(tmp_path: Path) -> None:
    class Predictor(Recorder):
        def predict_step(self, batch: list[int], batch_idx: int) -> list[int]:
            return batch

    trainer = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    predicted: Any = trainer.predict(Predictor(), evaluation_loader(range(5), ids, batch_size=2))
    assert [sample for batch in predicted for sample in batch] == [0, 1, 2, 3, 4]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You requested to overfit")
        module = fit(Recorder(), tmp_path, overfit_batches=2, max_epochs=2)
    assert [batch for *_, batch in module.seen] == [[0, 1], [2, 3]] * 2


def test_loaders_are_torchs() -> None:
    assert isinstance(loader(), torch.utils.data.DataLoader)
    assert isinstance(loader(), CheckedDataLoader)
