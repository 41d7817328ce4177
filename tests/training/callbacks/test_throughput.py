"""Throughput says what was done, how fast, and what held it up; counted by hand, and with clocks that are known."""

import csv
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mm.core import metric_names
from lightning_mm.core.decisions import decision_log
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.batch import Batch, CachedStates, TokenRegion
from lightning_mm.data.collator import Collator
from lightning_mm.execution.cache.activation_cache import CacheSettings
from lightning_mm.planning.devices import benchmark_matmul, compute_dtype
from lightning_mm.planning.flops import StepCost
from lightning_mm.planning.step_shape import StepShape
from lightning_mm.report.sections.run import charts
from lightning_mm.training.callbacks import throughput
from lightning_mm.training.callbacks.checkpoints import LastCheckpoint
from lightning_mm.training.callbacks.step_cost import BatchCounter
from lightning_mm.training.callbacks.throughput import ElapsedTime, IntervalTotals, Throughput, throughput_metrics
from lightning_mm.tuning import IntermediateOnly
from tests.helpers.cli import ROOT
from tests.helpers.data import Data, Family
from tests.helpers.training import train

MIDDLE = IntermediateOnly(layers="1-2")
PEAK = 1e12
ALL = {
    metric_names.SUPERVISED_TOKENS_PER_SECOND,
    metric_names.TOKENS_PER_SECOND,
    metric_names.IMAGE_TOKENS_PER_SECOND,
    metric_names.SAMPLES_PER_SECOND,
    metric_names.TFLOPS,
    metric_names.MFU,
    metric_names.DATA_WAIT,
    metric_names.PADDING,
    metric_names.PEAK_MEMORY,
}


class Watched(Throughput):
    """Keeps what is logged, the batches that it is of, and the seconds that it took."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []
        self.batches: list[list[Batch]] = [[]]
        self.spent: list[ElapsedTime] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.batches[-1].append(args[1])
        said = self._said
        super().on_train_batch_end(trainer, pl_module, *args)
        if self._said != said:
            self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k in ALL})
            self.batches.append([])

    def _interval(self, elapsed: ElapsedTime, module: L.LightningModule) -> IntervalTotals:
        self.spent.append(elapsed)
        return super()._interval(elapsed, module)


@pytest.fixture(autouse=True)
def _a_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "measured_peak", lambda *_: PEAK)


def interval(**given: float) -> IntervalTotals:
    plain = dict.fromkeys(IntervalTotals.__annotations__, 0.0) | {"seconds": 1.0, "peak": 1.0}
    return IntervalTotals(**(plain | given))


def test_rates_of_two_ranks_are_their_sums() -> None:
    """Rank 0 analysed a look for two of the four seconds, which rank 1 took for training; rank 1 waited for data."""
    one = interval(samples=4, supervised=10, tokens=60, image_tokens=32, positions=80, seconds=2, peak=4e12)
    two = interval(
        samples=4, supervised=30, tokens=70, image_tokens=32, positions=120, flops=5e12, seconds=4, peak=4e12
    )
    one = replace(one, flops=3e12)
    two = replace(two, flops=5e12, waiting=0.5, memory=3.0)
    assert throughput_metrics([one, two]) == pytest.approx(
        {
            metric_names.SUPERVISED_TOKENS_PER_SECOND: 20,
            metric_names.TOKENS_PER_SECOND: 65,
            metric_names.IMAGE_TOKENS_PER_SECOND: 32,
            metric_names.SAMPLES_PER_SECOND: 4,
            metric_names.TFLOPS: 4,
            metric_names.MFU: 0.5,
            metric_names.DATA_WAIT: 0.25,
            metric_names.PADDING: 0.35,
            metric_names.PEAK_MEMORY: 3,
        }
    )


@pytest.mark.parametrize(("given", "missing"), [({"flops": math.nan}, 2), ({"peak": math.nan}, 1)])
def test_what_is_not_known_is_not_logged(given: dict[str, float], missing: int) -> None:
    found = throughput_metrics([interval(), interval(**given)])
    assert len(ALL - set(found)) == missing
    assert all(math.isfinite(value) for value in found.values())


def test_every_rate_has_its_unit() -> None:
    for name in ALL:
        metric = metric_names.lookup(name)
        assert metric is not None
        assert metric.unit


def test_the_report_draws_what_is_logged() -> None:
    shown = charts({name: [(1, 0.5)] for name in ALL})
    drawn = {chart.title: [entry.label for entry in chart.legend] for chart in shown}
    assert drawn == {
        "Throughput": ["training"],
        "Tokens": ["all", "of pictures"],
        "Use of the device": ["waiting for data", "padding", "arithmetic (MFU)"],
        "Memory": ["largest of the ranks"],
    }


def by_hand(batches: list[Batch]) -> dict[str, float]:
    rows = [row.tolist() for batch in batches for row in batch.regions]
    regions = [region for row in rows for region in row]
    return {
        metric_names.SUPERVISED_TOKENS_PER_SECOND: regions.count(TokenRegion.ANSWER),
        metric_names.TOKENS_PER_SECOND: sum(region != TokenRegion.PAD for region in regions),
        metric_names.IMAGE_TOKENS_PER_SECOND: regions.count(TokenRegion.IMAGE),
        metric_names.SAMPLES_PER_SECOND: len(rows),
    }


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm"])
def test_what_is_logged_is_what_was_done(
    name: str, accumulate: int, family: Family, data: Data, tmp_path: Path
) -> None:
    """Every micro-batch counts, and in one interval only."""
    watched, steps = Watched(), 4
    module, trainer = train(
        family(name),
        data,
        tmp_path,
        tuning=MIDDLE,
        callbacks=[watched],
        max_steps=steps,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
        cache=CacheSettings(mode="off"),
    )
    assert [len(batches) for batches in watched.batches] == [2 * accumulate, 2 * accumulate, 0]
    example = trainer.datamodule.example_batch()  # type: ignore[attr-defined]
    cost = StepCost.of(module.mm, module.plan, example)
    for logged, batches, spent in zip(watched.logged, watched.batches, watched.spent, strict=False):
        seconds = spent.training
        assert logged.keys() == ALL
        done = by_hand(batches)
        assert {key: logged[key] * seconds for key in done} == pytest.approx(done, rel=1e-5)
        padded = 1 - done[metric_names.TOKENS_PER_SECOND] / sum(batch.regions.numel() for batch in batches)
        assert logged[metric_names.PADDING] == pytest.approx(padded, abs=1e-6)
        flops = sum(cost.at(StepShape.of(batch)).floor for batch in batches)
        assert logged[metric_names.TFLOPS] * seconds == pytest.approx(flops / 1e12, rel=1e-5)
        assert logged[metric_names.MFU] == pytest.approx(logged[metric_names.TFLOPS] * 1e12 / PEAK, rel=1e-5)


def test_what_comes_from_the_cache_is_not_counted_as_computed(family: Family, data: Data, tmp_path: Path) -> None:
    """Of a cached row remain what comes from the lowest trainable block on, and nothing of its picture."""
    module, trainer = train(family("llava"), data, tmp_path, tuning=MIDDLE, max_steps=1)
    batches = trainer.datamodule.sample_batches(2, 3)  # type: ignore[attr-defined]
    collator = trainer.datamodule.collator()  # type: ignore[attr-defined]
    cost = StepCost.of(module.mm, module.plan, trainer.datamodule.example_batch())  # type: ignore[attr-defined]

    def cached(batch: Batch, fresh: tuple[Batch, ...]) -> Batch:
        inputs = {key: value for key, value in batch.inputs.items() if key != "pixel_values"}
        kept = CachedStates(torch.zeros(0), (), fresh)
        return Batch(inputs, batch.regions, batch.supervised, batch.targets, batch.samples, cached=kept)

    def counted(batch: Batch) -> float:
        work = BatchCounter()
        work.add(batch)
        return work.take().flops(cost, module.plan)

    for batch in batches:
        whole = cost.at(StepShape.of(batch))
        below = sum(p.total for name, p in whole.parts(module.plan).items() if name in ("vision", "connector"))
        below += whole.layers(range(1)).total
        assert counted(batch) == pytest.approx(whole.floor)
        rows = tuple(collator([sample]) for sample in batch.samples)
        assert counted(cached(batch, rows)) == pytest.approx(whole.floor)
        assert counted(cached(batch, ())) == pytest.approx(whole.floor - below)
        assert 0 < below < whole.floor


def test_a_warm_cache_leaves_less_to_compute(family: Family, data: Data, tmp_path: Path) -> None:
    """Twice the same six batches, in two epochs: the second time from above the boundary."""
    watched = Watched()
    cache = CacheSettings(mode="on", folder=str(tmp_path / "cache"))
    options: dict[str, Any] = {"tuning": MIDDLE, "callbacks": [watched], "cache": cache}
    train(family("llava"), data, tmp_path, max_steps=12, log_every_n_steps=6, **options)
    cold, warm = (
        {key: logged[key] * spent.training for key in (metric_names.TFLOPS, metric_names.TOKENS_PER_SECOND)}
        for logged, spent in zip(watched.logged, watched.spent, strict=True)
    )
    assert warm[metric_names.TOKENS_PER_SECOND] == pytest.approx(cold[metric_names.TOKENS_PER_SECOND], rel=1e-5)
    assert warm[metric_names.TFLOPS] < 0.9 * cold[metric_names.TFLOPS]


def test_counting_does_not_wait_for_the_device(family: Family, data: Data, tmp_path: Path) -> None:
    """Reading a value back is ``aten::_local_scalar_dense``, or a copy to the host."""
    _, trainer = train(family("qwen2_5_vl"), data, tmp_path, tuning=MIDDLE, max_steps=1)
    batches = [batch.to("cpu") for batch in trainer.datamodule.sample_batches(3, 2)]  # type: ignore[attr-defined]
    called: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    work = BatchCounter()
    with Watch():
        for batch in batches:
            work.add(batch)
    assert called
    assert not called & {"_local_scalar_dense", "nonzero", "_to_copy", "item", "is_nonzero", "masked_select"}
    assert work.take().image_tokens == sum(int((b.regions == TokenRegion.IMAGE).sum()) for b in batches)


class Held(Collator):
    """Makes batches slowly."""

    seconds = 0.2

    def __call__(self, samples: Any) -> Batch:
        time.sleep(self.seconds)
        return super().__call__(samples)


def timed(family: Family, data: Data, folder: Path, *callbacks: Callback, **options: Any) -> Watched:
    watched = Watched()
    train(
        family("llava"),
        data,
        folder,
        tuning=MIDDLE,
        callbacks=[*callbacks, watched],
        max_steps=6,
        log_every_n_steps=3,
        cache=CacheSettings(mode="off"),
        **options,
    )
    return watched


def test_waiting_for_data_is_told(family: Family, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six batches an epoch: three waits of 0.2 s in the second interval; the first begins with a batch, and has two."""
    monkeypatch.setattr("lightning_mm.data.datamodule.Collator", Held)
    watched = timed(family, data, tmp_path)
    assert [spent.waiting // Held.seconds for spent in watched.spent] == [2, 3]
    for row, spent in zip(watched.logged, watched.spent, strict=True):
        assert row[metric_names.DATA_WAIT] == pytest.approx(spent.waiting / spent.training)
        assert row[metric_names.DATA_WAIT] < 1


class Slow(Callback):
    """Holds the run up where it is no training."""

    def on_validation_batch_start(self, *args: Any) -> None:
        time.sleep(0.3)


class SlowSaving(LastCheckpoint):
    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        time.sleep(0.5)
        super()._save_checkpoint(trainer, filepath)


def test_validation_and_checkpoints_are_no_training(
    family: Family, data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each interval holds a validation of 1.2 s and more; a save of 0.5 s and more."""
    saving = SlowSaving(2)
    saving.run = RunDirectory(tmp_path)
    with caplog.at_level("INFO", logger="lightning_mm"):
        held = timed(family, data, tmp_path, Slow(), saving, limit_val_batches=2, val_check_interval=2)
    first, second = held.spent
    assert min(first.validation, second.validation) > 1.2
    assert first.checkpoints > 0.5
    assert second.checkpoints > 0.5
    for row, spent in zip(held.logged, held.spent, strict=True):
        assert spent.training == pytest.approx(spent.wall - spent.validation - spent.checkpoints)
        assert row[metric_names.SAMPLES_PER_SECOND] == pytest.approx(6 / spent.training, rel=1e-5)
    (told,) = [record.message for record in caplog.records if record.message.startswith("time:")]
    assert ", validation " in told
    assert ", checkpoints " in told


class Looks(Callback):
    """Looks for a second where a run ends: within the last validation, and after it."""

    inspection_seconds = 0.0

    def on_validation_end(self, *args: Any) -> None:
        time.sleep(1.0)
        self.inspection_seconds += 1.0

    on_train_end = on_validation_end


def test_a_look_that_meets_the_last_validation_is_counted_once(
    family: Family, data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Counted twice, six looks' seconds (here of 1.0 s) would make the few of training negative."""
    with caplog.at_level("INFO", logger="lightning_mm"):
        timed(family, data, tmp_path, Looks(), limit_val_batches=1, val_check_interval=2)
    (told,) = [record.message for record in caplog.records if record.message.startswith("time:")]
    seconds = {name: float(value) for name, value in re.findall(r"(\w[\w ]*) (-?[\d.]+) s", told)}
    whole = float(told.split()[1])
    assert seconds["looks inside"] in (3.0, 4.0)
    assert seconds["training"] > 0
    assert seconds["validation"] >= 0
    assert whole == pytest.approx(seconds["training"] + seconds["validation"] + seconds["looks inside"], abs=0.2)


def test_the_parts_of_the_time() -> None:
    spent = ElapsedTime(wall=10.0, waiting=1.0, validation=2.0, inspection=0.0, checkpoints=0.5).since(
        ElapsedTime(0, 0, 0, 0, 0)
    )
    assert spent.training == 7.5
    assert str(spent) == "10.0 s: training 7.5 s (waiting for data 1.0 s), validation 2.0 s, checkpoints 0.5 s"


def test_measuring_leaves_training_as_it_is(
    family: Family, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, the real measurement included."""
    monkeypatch.setattr(throughput, "measured_peak", lambda device, dtype: benchmark_matmul(device, dtype, 0.01))
    weights = []
    for callbacks in ([], [Throughput()]):
        options: dict[str, Any] = {"callbacks": callbacks, "max_steps": 3, "log_every_n_steps": 1}
        module, _ = train(family("qwen2_5_vl"), data, tmp_path, tuning=MIDDLE, **options)
        weights.append({name: parameter.detach().clone() for name, parameter in module.trainable.items()})
        assert not any("cpu" in str(p.device) and p.is_meta for p in module.parameters())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(decision.name == "throughput.peak" for decision in decision_log())


def test_a_model_that_cannot_be_counted_trains_all_the_same(
    family: Family, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> StepCost:
        raise RuntimeError("branches on its weights")

    monkeypatch.setattr(StepCost, "of", refused)
    decision_log().clear()
    watched = timed(family, data, tmp_path)
    assert watched.logged[-1].keys() == ALL - {metric_names.TFLOPS, metric_names.MFU}
    assert any("branches on its weights" in decision.reason for decision in decision_log())


def test_a_run_that_logs_nothing_measures_nothing(family: Family, data: Data, tmp_path: Path) -> None:
    decision_log().clear()
    train(family("llava"), data, tmp_path, tuning=MIDDLE, callbacks=[Throughput()], max_steps=2, log_every_n_steps=5)
    assert not any(decision.name.startswith("throughput") for decision in decision_log())


def test_the_peak_is_that_of_this_machine() -> None:
    """Against a product timed here: within a factor, since other processes share the cores."""
    before = torch.random.get_rng_state()
    peak = benchmark_matmul(torch.device("cpu"), torch.float32, 0.2)
    assert torch.equal(before, torch.random.get_rng_state())
    a = torch.randn(1024, 1024)
    torch.mm(a, a)
    began = time.perf_counter()
    for _ in range(3):
        torch.mm(a, a)
    assert 0.2 < peak / (3 * 2 * 1024**3 / (time.perf_counter() - began)) < 5


def test_the_peak_is_measured_in_what_the_run_computes_in() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64).bfloat16(), torch.nn.Linear(4, 4))
    assert compute_dtype(model, "32-true") is torch.bfloat16
    assert compute_dtype(model.float(), "32-true") is torch.float32
    assert compute_dtype(model, "bf16-mixed") is torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_waited_for_once_per_interval(family: Family, data: Data, tmp_path: Path) -> None:
    peak = benchmark_matmul(torch.device("cuda", 0), torch.bfloat16)
    assert 1e13 < peak < 1e16
    watched = timed(family, data, tmp_path, accelerator="gpu", devices=1, precision="bf16-mixed")
    assert watched.logged[-1].keys() == ALL
    assert 0 < watched.logged[-1][metric_names.PEAK_MEMORY] < torch.cuda.get_device_properties(0).total_memory / 2**30


def test_two_ranks_are_added_up(family: Family, data: Data, tmp_path: Path) -> None:
    """Two ranks, three batches of two each: all twelve rows in one interval, so ratios to samples are of the whole."""
    module, trainer = train(family("llava"), data, tmp_path, tuning=MIDDLE, max_steps=1)
    batches = trainer.datamodule.sample_batches(6, 2)  # type: ignore[attr-defined]
    done = by_hand(batches)
    cost = StepCost.of(module.mm, module.plan, batches[0])
    flops = sum(cost.at(StepShape.of(batch)).floor for batch in batches)
    arguments = [
        *("--model.backbone.path", str(family("llava")), "--data.train", str(data["train"])),
        *("--model.tuning", "IntermediateOnly", "--model.tuning.layers", "1-2", "--model.cache.mode", "off"),
        *("--data.num_workers", "0", "--data.batch_size", "2", "--run.wandb", "off", "--run.name", "two"),
        *("--evaluation.before", "false", "--evaluation.after", "false", "--trainer.accelerator", "cpu"),
        *("--trainer.devices", "2", "--trainer.strategy", "ddp"),
        *("--trainer.max_steps", "3", "--trainer.log_every_n_steps", "3"),
    ]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_mm", "fit", *arguments]
    run = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr
    with (tmp_path / "runs/two/metrics.csv").open(newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row[metric_names.SAMPLES_PER_SECOND]]
    logged = {key: float(row[key]) for key in ALL}
    seconds = 12 / logged[metric_names.SAMPLES_PER_SECOND]
    assert {key: logged[key] * seconds for key in done} == pytest.approx(done, rel=1e-5)
    assert logged[metric_names.TFLOPS] * seconds == pytest.approx(flops / 1e12, rel=1e-5)
    assert "throughput.peak" in run.stdout + run.stderr
