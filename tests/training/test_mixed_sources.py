"""Training on several sources: exact order and resume, mixed and streamed; and the loss of each source."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch
from lightning_mm.data.sample import Sample
from lightning_mm.execution.loss import LossOutput
from lightning_mm.training.source_losses import SourceLosses
from tests.helpers import mixed_ranks
from tests.helpers.data import Data, Family, make_rows
from tests.helpers.fits import Fits, short_fits
from tests.helpers.mixed_ranks import KINDS, RowsSeen, sources
from tests.helpers.training import DROPOUT, MIDDLE, Losses, SaveAt, train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sources a (4 rows) and b (8 rows), and two for validation; in a and b every second row has the picture before."""
    for seed, (name, count) in enumerate({"a": 4, "b": 8, "c": 3, "d": 2}.items()):
        (tmp_path / name).mkdir()
        rows = make_rows(tmp_path / name, count, seed=seed)
        if name in "ab":
            for row, before in zip(rows[1::2], rows[::2], strict=True):
                row["image"] = before["image"]
        (tmp_path / f"{name}.json").write_text(
            json.dumps([{**row, "image": f"{name}/{row['image']}"} if "image" in row else row for row in rows])
        )
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("workers", "step"), [(0, 2), (2, 7)])
def test_killed_and_resumed_equals_uninterrupted(
    kind: str, workers: int, step: int, folder: Path, family: Family
) -> None:
    """An epoch of 12 rows is 6 batches (a stream's with weights, a few more): step 7 is in the second."""
    options: dict[str, Any] = {"tuning": DROPOUT, "data_options": KINDS[kind], "max_steps": 9, "num_workers": workers}
    data = {"train": sources(folder)}
    whole, seen, first, second = Losses(), RowsSeen(), RowsSeen(), RowsSeen()
    rest = Losses()
    expected, _ = train(family("llava"), data, folder, callbacks=[whole, seen], **options)
    checkpoint = folder / "killed.ckpt"
    with pytest.raises(SystemExit):
        train(family("llava"), data, folder, callbacks=[first, SaveAt(step, checkpoint)], **options)
    torch.rand(7)  # whatever the new process did before
    resumed, _ = train(family("llava"), data, folder, callbacks=[rest, second], ckpt_path=checkpoint, **options)
    assert first.batches + second.batches == seen.batches
    for name, parameter in expected.trainable.items():
        assert torch.equal(parameter, resumed.trainable[name]), name
    assert {s: v for s, v in rest.by_step.items() if s > step} == {s: v for s, v in whole.by_step.items() if s > step}
    if kind == "mixed":  # 2 * sqrt(4) : sqrt(8) of 12 rows
        epoch = Counter(name[0] for batch in seen.batches[:6] for name in batch)
        assert epoch == {"a": 7, "b": 5}


def test_two_ranks_go_on_where_they_stopped(folder: Path, family: Family) -> None:
    mixed_ranks.launch(folder, family("llava"))
    for kind in KINDS:
        ranks = [json.loads((folder / f"{kind}-{rank}.json").read_text()) for rank in range(2)]
        for rank in ranks:
            assert rank["equal"], "bit for bit"
            assert len(rank["whole"]) == mixed_ranks.STEPS
            assert rank["first"] + rank["second"] == rank["whole"]
        assert len(ranks[0]["first"]) == mixed_ranks.STOP
        epoch = Counter(name for rank in ranks for batch in rank["whole"][:3] for name in batch)
        if kind == "mixed":
            assert Counter(name[0] for name in epoch.elements()) == {"a": 7, "b": 5}
            assert {count for name, count in epoch.items() if name[0] == "a"} == {1, 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": 3.0}, r"mixture was a 7 of 4, b 5 of 8, is a 8 of 4, b 4 of 8"),
        ({"limit": 3}, "the rows of data.train differ"),
    ],
    ids=str,
)
def test_another_mixture_is_refused(change: dict[str, Any], words: str, folder: Path, family: Family) -> None:
    options: dict[str, Any] = {"tuning": MIDDLE, "data_options": KINDS["mixed"]}
    checkpoint, given = folder / "killed.ckpt", sources(folder)
    with pytest.raises(SystemExit):
        train(family("llava"), {"train": given}, folder, callbacks=[SaveAt(2, checkpoint)], max_steps=4, **options)
    changed = [{**given[0], **change}, given[1]]
    with pytest.raises(UserError, match=words):
        train(family("llava"), {"train": changed}, folder, ckpt_path=checkpoint, max_steps=4, **options)


class Logged(Callback):
    """Keeps the metrics that were logged before each batch and at the end, and those of the last validation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.validated: dict[str, float] = {}

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    on_train_end = on_train_batch_start

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.validated = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}


def test_losses_by_source_add_up_and_change_nothing(
    folder: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"tuning": DROPOUT, "max_steps": 6, "log_every_n_steps": 1, "accumulate_grad_batches": 2}
    logged, measured, without = Logged(), Losses(), Losses()
    data = {"train": sources(folder)}
    expected, _ = train(family("llava"), data, folder, callbacks=[measured, logged], **options)
    steps = logged.steps[2::2]  # a step has two batches
    assert len(steps) == 6
    for step in steps:
        parts = [step[f"train/token_share/{name}"] * step.get(f"train/loss/{name}", 0) for name in "ab"]
        assert sum(parts) == pytest.approx(step["train/loss"], rel=1e-6)  # sums of float32 in another order
        assert sum(step[f"train/token_share/{name}"] for name in "ab") == pytest.approx(1)
    assert len({step["train/loss/a"] for step in steps}) > 1
    monkeypatch.setattr(SourceLosses, "add", lambda *_: None)
    plain, _ = train(family("llava"), data, folder, callbacks=[without], **options)
    assert without.by_step == measured.by_step
    assert all(torch.equal(value, plain.trainable[name]) for name, value in expected.trainable.items())


def test_a_step_that_is_passed_over_counts_in_no_source() -> None:
    """Two steps of one token each, and between them one that is not finite."""
    losses = SourceLosses(("a", "b"))
    for nll, kept in ((2.0, True), (float("nan"), False), (4.0, True)):
        each = torch.tensor([nll, 1.0])
        samples = tuple(Sample(name, (), source=name) for name in "ab")
        batch = Batch({}, torch.ones(2, 3), torch.tensor([0, 3]), torch.tensor([7, 7]), samples)
        losses.add(LossOutput(each.sum(), 2, each, each > 0), batch)
        if not kept:
            losses.drop_step()
        losses.keep_step()
    found = losses.close(lambda held: held)
    assert found == {"train/token_share/a": 0.5, "train/loss/a": 3.0, "train/token_share/b": 0.5, "train/loss/b": 1.0}
    losses.drop_step()
    assert losses.close(lambda held: held) == {}


def test_one_source_is_not_measured_by_itself(folder: Path, family: Family) -> None:
    logged = Logged()
    data = {"train": [str(folder / "a.json")], "val": str(folder / "c.json")}
    train(
        family("llava"), data, folder, tuning=MIDDLE, callbacks=[logged], max_steps=2, log_every_n_steps=1,
        limit_val_batches=1.0,
    )  # fmt: skip
    assert "val/loss" in logged.validated
    assert not [name for name in (*logged.steps[-1], *logged.validated) if "loss/" in name or "share" in name]


def test_validation_losses_are_those_of_each_source_alone(folder: Path, family: Family) -> None:
    """A learning rate of 0 keeps the model as it is; 1e-5: batches of other rows are padded otherwise."""
    found = []
    for names in (["c", "d"], ["c"], ["d"]):
        logged = Logged()
        data = {"train": str(folder / "a.json"), "val": [str(folder / f"{name}.json") for name in names]}
        train(
            family("llava"), data, folder, tuning=MIDDLE, callbacks=[logged], max_steps=2, limit_val_batches=1.0,
            max_epochs=1,
        )  # fmt: skip
        found.append(logged.validated)
    both, only_c, only_d = found
    assert both["val/loss/c"] == pytest.approx(only_c["val/loss"], rel=1e-5)
    assert both["val/loss/d"] == pytest.approx(only_d["val/loss"], rel=1e-5)
    assert both["val/loss/c"] != pytest.approx(both["val/loss/d"], rel=1e-3)


@pytest.fixture
def fit(
    family: Family, data: Data, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Fits:
    return short_fits(family("llava"), data, tmp_path, capfd, monkeypatch)


def test_the_command_line_mixes_and_goes_on_from_its_config(fit: Fits, folder: Path) -> None:
    steady = ("--model.optimizer.schedule=constant", "--model.optimizer.warmup=0")
    mixed = ("--data.train=[{path: a.json, weight: 2}, b.json]", "--data.temperature=2")
    whole = fit(*mixed, *steady, "--trainer.max_steps=8")
    assert whole.status == 0, whole.output
    assert "12 rows an epoch (a: 7 of 4 rows" in whole.decisions
    counts = [(row["split"], row["name"], row["read"], row["per_epoch"]) for row in whole.read("sources.json")]
    assert counts == [("train", "a", 4, 7), ("train", "b", 8, 5), ("val", "val", 4, None)]
    assert "train/loss/a" in whole.rows[0]
    assert 'id="sources"' in (whole.run / "report.html").read_text()
    expected = whole.checkpoint()["state_dict"]
    config = f"--config={whole.run / 'config.yaml'}"  # what was written is what is read
    assert fit(config, *steady, "--run.name=part", "--trainer.max_steps=4").status == 0
    checkpoint = folder / "runs/part/checkpoints/last.ckpt"
    done = fit(config, *steady, "--run.name=rest", "--trainer.max_steps=8", f"--ckpt_path={checkpoint}")
    assert done.status == 0, done.output
    resumed = torch.load(folder / "runs/rest/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_sources_are_added_one_by_one(fit: Fits, folder: Path) -> None:
    done = fit("--data.train=a.json", "--data.train+=b.json")
    assert done.status == 0, done.output
    assert [row["name"] for row in done.read("sources.json") if row["split"] == "train"] == ["a", "b"]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--data.train=[{path: a.json, weight: -2}, b.json]", "a: weight is -2"),
        ("--data.train=[{path: a.json, wieght: 2}, b.json]", "wieght"),
        ("--data.temperature=0", "data.temperature is 0"),
    ],
)
def test_a_mistake_in_a_source_is_said(option: str, words: str, fit: Fits, folder: Path) -> None:
    done = fit(option)
    assert done.status == 2
    assert words in done.error


def test_the_command_line_streams(fit: Fits, folder: Path) -> None:
    done = fit("--data.train=[a.json, b.json]", "--data.streaming=true", "--data.shuffle_buffer=3")
    assert done.status == 0, done.output
    assert "drawn among 3 rows in memory (data.shuffle_buffer)" in done.decisions
    read = {row["name"]: row["read"] for row in done.read("sources.json") if row["split"] == "train"}
    assert 4 <= sum(read.values()) <= 12
