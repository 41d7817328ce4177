"""What can go wrong while looking inside, and what looking costs: training goes on, and all of it is said."""

import json
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors import SafetensorError

from lightning_mm.analysis.findings import Findings, FindingsWriter
from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.callbacks import GeometryCallback, ProbingCallback, Schedule, reader, runner
from lightning_mm.callbacks.runner import InspectionInput
from lightning_mm.callbacks.schedule import Budget
from lightning_mm.core import metric_names
from lightning_mm.core.decisions import decision_log
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.training.callbacks.throughput import Throughput
from lightning_mm.tuning import PerRegion
from tests.helpers.data import Data, Family
from tests.helpers.inspection import EVERY, RecordingCallback, rows_of
from tests.helpers.training import MIDDLE
from tests.helpers.training import train as train_in_twos

train = partial(train_in_twos, batch_size=6)


class Other(RecordingCallback):
    """A second kind of callback: a run takes one of each."""


class Slow(RecordingCallback):
    def analyze(self, data: InspectionInput) -> Findings:
        time.sleep(1)
        return super().analyze(data)


def problems_of(folder: Path) -> list[str]:
    return [problem for row in json.loads((folder / "inspections.json").read_text()) for problem in row["problems"]]


def without_captions(probes: Path) -> Path:
    rows = [{key: row[key] for key in ("id", "image", "objects")} for row in json.loads(probes.read_text())]
    file = probes.with_name("objects.json")
    file.write_text(json.dumps(rows))
    return file


def test_probes_without_captions_are_looked_into(family: Family, data: Data, probes: Path, tmp_path: Path) -> None:
    """There is no entailment row to read without its picture: that baseline is left out, and nothing else."""
    kept = RecordingCallback()
    probed = {**data, "probes": without_captions(probes)}
    callbacks = [kept, ProbingCallback(EVERY), GeometryCallback(EVERY)]
    train(family("llava"), probed, tmp_path, callbacks=callbacks, tuning=MIDDLE, max_steps=2)
    assert [look.step for look in kept.looks] == [0, 1, 2]
    assert not [problem for problem in problems_of(tmp_path) if "nothing was read" in problem]
    assert {row.step for row in rows_of(tmp_path)} == {0, 1, 2}


def test_a_baseline_that_fails_costs_the_baseline_only(
    family: Family, probed: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_read = reader.extract_hidden_states

    def broken(mm: Any, batches: Iterable[Any], *args: Any, **options: Any) -> HiddenStates:
        held = list(batches)
        if held[0].rows[0].blank:
            raise RuntimeError("grey")
        return true_read(mm, held, *args, **options)

    monkeypatch.setattr(reader, "extract_hidden_states", broken)
    train(family("llava"), probed, tmp_path, callbacks=[ProbingCallback(EVERY)], tuning=MIDDLE, max_steps=1)
    assert {row.step for row in rows_of(tmp_path)} == {0, 1}
    assert [p for p in problems_of(tmp_path) if "without pictures" in p and "RuntimeError: grey" in p]


def test_the_baseline_comes_at_the_first_look_that_is_due(family: Family, probed: Data, tmp_path: Path) -> None:
    schedule = Schedule(every=2, start=False, budget=None)
    train(family("llava"), probed, tmp_path, callbacks=[ProbingCallback(schedule)], tuning=MIDDLE, max_steps=5)
    assert {row.step for row in rows_of(tmp_path)} == {2, 4, 5}
    assert {row.step for row in rows_of(tmp_path) if row.measure.endswith("text_only")} == {2, 5}


def test_nothing_is_read_twice_where_no_block_trains(
    family: Family, probed: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only norm and head train: every slice stays as it was, and every look is of its own step all the same."""
    kept = RecordingCallback()
    forwards: list[int] = []
    true_encoded = reader.Reader._encoded

    def counted(self: reader.Reader, *args: Any) -> Iterable[Any]:
        for batch in true_encoded(self, *args):
            forwards.append(self.subject.root.trainer.global_step)
            yield batch

    monkeypatch.setattr(reader.Reader, "_encoded", counted)
    policy = PerRegion(norm="full", head="full")
    train(family("llava"), probed, tmp_path, callbacks=[kept], tuning=policy, max_steps=2)
    assert [look.reading.step for look in kept.looks] == [0, 1, 2]
    assert set(forwards) == {0}
    for look in kept.looks[1:]:
        assert all(torch.equal(x, kept.looks[0].reading.features[place]) for place, x in look.reading.features.items())


def test_rows_that_cannot_be_read_never_stop_training(family: Family, data: Data, probes: Path, tmp_path: Path) -> None:
    rows = json.loads(probes.read_text())
    rows[0]["caption"] = "a tiny square " * 300
    probes.write_text(json.dumps(rows))
    kept = RecordingCallback()
    _, trainer = train(
        family("llava"),
        {**data, "probes": probes},
        tmp_path,
        callbacks=[kept],
        tuning=MIDDLE,
        max_steps=2,
        max_length=300,
    )
    assert trainer.global_step == 2
    ledger = trainer.datamodule.rejected_samples  # type: ignore[attr-defined]
    assert any(entry.kind == "probe" and entry.reason.startswith("too long") for entry in ledger)
    assert ledger.num_dropped == 0
    ledger.check()
    assert [problem for problem in problems_of(tmp_path) if "too long" in problem]


def test_no_fault_of_rank_0_stops_training(
    family: Family, probed: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> Any:
        def failing(*args: Any, **options: Any) -> None:
            raise error

        return failing

    with monkeypatch.context() as patched:
        patched.setattr(runner, "summary_metrics", fail(StopIteration("none")))
        train(family("llava"), probed, tmp_path, callbacks=[GeometryCallback(EVERY)], tuning=MIDDLE, max_steps=1)
    assert rows_of(tmp_path), "what could be had is written down"
    monkeypatch.setattr(FindingsWriter, "write_probe_set", fail(OSError("no space")))
    monkeypatch.setattr(FindingsWriter, "save_start", fail(SafetensorError("cut")))
    monkeypatch.setattr(FindingsWriter, "write", fail(BufferError("full")))
    _, trainer = train(family("llava"), probed, tmp_path, callbacks=[RecordingCallback()], tuning=MIDDLE, max_steps=1)
    monkeypatch.setattr(reader, "gather_hidden_states", fail(ZeroDivisionError("order")))
    train(family("llava"), probed, tmp_path, callbacks=[RecordingCallback()], tuning=MIDDLE, max_steps=1)
    assert trainer.global_step == 1
    for told in (
        "OSError: no space",
        "SafetensorError: cut",
        "BufferError: full",
        "StopIteration",
        "ZeroDivisionError",
    ):
        assert told in caplog.text


def test_large_probe_sets_are_encoded_anew(
    family: Family, probed: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    true_loader = MMDataModule.probe_loader

    def counted(self: MMDataModule, probe_set: Any) -> Any:
        made.append(len(probe_set))
        return true_loader(self, probe_set)

    monkeypatch.setattr(MMDataModule, "probe_loader", counted)
    train(family("llava"), probed, tmp_path, callbacks=[RecordingCallback()], tuning=MIDDLE, max_steps=2)
    assert len(made) == 1
    monkeypatch.setattr(reader, "_HELD_BYTES", 1000)
    train(family("llava"), probed, tmp_path, callbacks=[RecordingCallback()], tuning=MIDDLE, max_steps=2)
    assert len(made) == 1 + 3


def test_a_budget_is_each_callback_s_own(family: Family, probed: Data, tmp_path: Path) -> None:
    decision_log().clear()
    free, bound = RecordingCallback(), Other(Schedule(every=1, budget=1e-6))
    train(family("llava"), probed, tmp_path, callbacks=[free, bound], tuning=MIDDLE, max_steps=3)
    assert [look.step for look in free.looks] == [0, 1, 2, 3]
    assert [look.step for look in bound.looks] == [0, 3]
    told = [d.value for d in decision_log() if d.name == "inspection.schedule"]
    assert told == ["no look of Other at step 1", "no look of Other at step 2"]


def test_a_checkpoint_knows_the_time_that_is_running(family: Family, probed: Data, tmp_path: Path) -> None:
    kept = RecordingCallback(Schedule(times=0, start=False, end=False))
    saved: list[float] = []

    class Save(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            saved.append(kept.state_dict()["training"])

    train(family("llava"), probed, tmp_path, callbacks=[kept, Save()], tuning=MIDDLE, max_steps=3)
    assert 0 < saved[0] < saved[1] < saved[2]


def test_the_share_holds_the_look_itself() -> None:
    assert Budget(spent=2, count=1, training=100).share(3) == 0.05


def test_looking_does_not_slow_what_is_measured(family: Family, probed: Data, tmp_path: Path) -> None:
    """A look takes a second, a step of the tiny model far less than half of one."""
    rates: list[float] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            rates.extend(float(v) for k, v in trainer.callback_metrics.items() if k == metric_names.SAMPLES_PER_SECOND)

    callbacks = [Slow(), Throughput(), Watch()]
    train(family("llava"), probed, tmp_path, callbacks=callbacks, tuning=MIDDLE, max_steps=3, log_every_n_steps=1)
    assert rates
    assert min(rates) > 6 / 0.5
