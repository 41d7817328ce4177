"""Looking inside while a model trains: it changes nothing, costs one forward pass, and says what it cost."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_mm.analysis.findings import Findings
from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.callbacks import DriftCallback, GeometryCallback, ProbingCallback, Schedule, reader, subject
from lightning_mm.callbacks.base import LayerCallback
from lightning_mm.callbacks.runner import InspectionInput
from lightning_mm.callbacks.schedule import Budget
from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.execution.cache.activation_cache import CacheSettings
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import ConnectorOnly, Full, LoRA, LoRAOnMiddle
from tests.helpers.data import Family
from tests.helpers.inspection import EVERY, RecordingCallback, rows_of
from tests.helpers.training import DROPOUT, MIDDLE, Losses, train


def lookers(schedule: Schedule = EVERY) -> list[Callback]:
    return [ProbingCallback(schedule), GeometryCallback(schedule), DriftCallback(schedule)]


class Failing(LayerCallback):
    def analyze(self, data: InspectionInput) -> Findings:
        raise ArithmeticError("singular")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_that_is_looked_into_is_bit_identical(
    precision: str, family: Family, data: dict[str, Path], probes: Path, tmp_path: Path
) -> None:
    plain, watched = Losses(), Losses()
    options = {"tuning": DROPOUT, "max_steps": 4, "precision": precision, "accumulate_grad_batches": 2}
    alone, _ = train(family("llava"), data, tmp_path, callbacks=[plain], **options)
    probed = {**data, "probes": probes}
    seen, trainer = train(family("llava"), probed, tmp_path / "run", callbacks=[watched, *lookers()], **options)
    assert watched.by_step == plain.by_step
    for name, parameter in alone.trainable.items():
        assert torch.equal(parameter, seen.trainable[name]), name
    moments = [s["exp_avg"] for s in trainer.optimizers[0].state.values()]
    assert all(torch.isfinite(m).all() for m in moments)
    assert {row.step for row in rows_of(tmp_path / "run")} == {0, 1, 2, 3, 4}


def test_all_that_are_due_share_one_forward(
    family: Family, probed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    true_read = reader.extract_hidden_states

    def counted(*args, **options):  # type: ignore[no-untyped-def]
        seen.append(options["step"])
        return true_read(*args, **options)

    monkeypatch.setattr(reader, "extract_hidden_states", counted)
    callbacks = [ProbingCallback(EVERY, text_only=False), GeometryCallback(EVERY), DriftCallback(Schedule(every=2))]
    train(family("llava"), probed, tmp_path, callbacks=callbacks, tuning=MIDDLE, max_steps=3)
    assert seen == [0, 1, 2, 3]


def test_what_cannot_move_is_read_once(family: Family, probed: dict[str, Path], tmp_path: Path) -> None:
    kept = RecordingCallback()
    train(family("llava"), probed, tmp_path, callbacks=[kept], tuning=MIDDLE, max_steps=2)
    first, *later = [look.reading for look in kept.looks]
    for reading in later:
        for place, features in reading.features.items():
            assert torch.equal(features[:3], first.features[place][:3])
            assert not torch.equal(features[3], first.features[place][3])


def test_slices_from_before_are_those_that_would_be_read_again(
    family: Family, probed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run, once with the shortcut for unchanged slices and once without it."""
    short, whole = RecordingCallback(), RecordingCallback()
    train(family("llava"), probed, tmp_path, callbacks=[short], tuning=MIDDLE, max_steps=2)
    monkeypatch.setattr(subject, "unchanged_slices", lambda plan: 0)
    train(family("llava"), probed, tmp_path, callbacks=[whole], tuning=MIDDLE, max_steps=2)
    for one, other in zip(short.looks, whole.looks, strict=True):
        assert all(torch.equal(x, other.reading.features[place]) for place, x in one.reading.features.items())


def test_later_looks_begin_above_the_frozen_prefix(family: Family, probed: dict[str, Path], tmp_path: Path) -> None:
    """The same readings (weights differ by the order of sums), but only the first look shows the model the pictures."""
    readings: dict[str, list[HiddenStates]] = {}
    towers: dict[str, list[int]] = {}
    for mode in ("off", "on"):
        kept, ran = RecordingCallback(), towers.setdefault(mode, [])

        def count(module: MMModule, kept: RecordingCallback = kept, ran: list[int] = ran) -> None:
            block = module.model.get_submodule(module.mm.layout.vision_blocks[0])
            block.register_forward_hook(lambda *_: None if module.training else ran.append(len(kept.looks)))

        cache = CacheSettings(mode=mode, folder=str(tmp_path / "kept"))
        options: dict[str, Any] = {"tuning": MIDDLE, "max_steps": 2, "callbacks": [kept], "on_start": count}
        train(family("llava"), probed, tmp_path / mode, cache=cache, **options)
        readings[mode] = [look.reading for look in kept.looks]
    assert len(readings["on"]) == len(readings["off"]) == 3
    for on, off in zip(readings["on"], readings["off"], strict=True):
        for place, features in off.features.items():
            torch.testing.assert_close(on.features[place], features, rtol=1e-4, atol=1e-5)
    assert towers["off"].count(2) > 0, "its third look runs the tower"
    assert towers["on"].count(2) == 0


@pytest.mark.parametrize("policy", [Full(), ConnectorOnly(), LoRAOnMiddle(layers="1-2", lora=LoRA(r=2))])
def test_drift_begins_at_the_lowest_weight_that_trains(
    policy: object, family: Family, probed: dict[str, Path], tmp_path: Path
) -> None:
    train(family("llava"), probed, tmp_path, callbacks=[DriftCallback(EVERY)], tuning=policy, max_steps=2)  # type: ignore[arg-type]
    rows = {r.layer: r for r in rows_of(tmp_path) if (r.step, r.measure, r.site) == (2, "drift_cosine", "image")}
    lowest = {"Full": -1, "ConnectorOnly": -1, "LoRAOnMiddle": 1}[type(policy).__name__]
    for layer, row in rows.items():
        assert row.value is not None
        assert (row.value == 1.0) == (layer < lowest), layer


def test_a_failing_analysis_is_reported_and_training_goes_on(
    family: Family, probed: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callbacks = [Failing(EVERY), GeometryCallback(EVERY)]
    _, trainer = train(family("llava"), probed, tmp_path, callbacks=callbacks, tuning=MIDDLE, max_steps=2)
    assert trainer.global_step == 2
    assert "Failing failed at step 1: ArithmeticError: singular; training goes on" in caplog.text
    told = json.loads((tmp_path / "inspections.json").read_text())
    assert [row["step"] for row in told] == [0, 1, 2]
    assert all("singular" in row["problems"][0] for row in told)
    assert rows_of(tmp_path)


def test_a_failing_forward_is_reported_and_training_goes_on(
    family: Family, probed: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    def broken(*args: object, **options: object) -> HiddenStates:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(reader, "extract_hidden_states", broken)
    _, trainer = train(family("llava"), probed, tmp_path, callbacks=lookers(), tuning=MIDDLE, max_steps=2)
    assert trainer.global_step == 2
    assert "nothing was read at step 2: RuntimeError: CUDA out of memory" in caplog.text


def test_an_expensive_schedule_is_thinned_and_says_so(family: Family, probed: dict[str, Path], tmp_path: Path) -> None:
    decision_log().clear()
    kept = RecordingCallback(Schedule(every=1, budget=1e-6))
    train(family("llava"), probed, tmp_path, callbacks=[kept], tuning=MIDDLE, max_steps=4)
    assert [look.step for look in kept.looks] == [0, 4]
    told = [d for d in decision_log() if d.name == "inspection.schedule"]
    assert [d.value for d in told] == [f"no look at step {step}" for step in (1, 2, 3)]


def test_budget_counts_what_must_still_come() -> None:
    """100 s of training expected, 5 % of it allowed: looks of 1 s, one of them kept for the end."""
    assert Budget(spent=3, count=3, training=50).affords(0.05, 50, 100, more_to_keep=1)
    assert not Budget(spent=4, count=4, training=50).affords(0.05, 50, 100, more_to_keep=1)
    assert Budget(spent=4, count=4, training=50).affords(None, 50, 100, more_to_keep=1)


def test_a_resumed_run_goes_on_where_it_was(family: Family, probed: dict[str, Path], tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    train(family("llava"), probed, whole, callbacks=[DriftCallback(EVERY)], tuning=MIDDLE, max_steps=4)
    _, trainer = train(
        family("llava"),
        probed,
        half,
        callbacks=[DriftCallback(EVERY)],
        tuning=MIDDLE,
        max_steps=4,
        limit_train_batches=2,
    )
    expected = [row for row in rows_of(whole) if row.step == 4]
    assert expected
    (half / "layers.csv").unlink()
    trainer.save_checkpoint(half / "at.ckpt")
    decision_log().clear()
    train(
        family("llava"),
        probed,
        half,
        callbacks=[DriftCallback(EVERY)],
        tuning=MIDDLE,
        max_steps=6,
        ckpt_path=half / "at.ckpt",
    )
    found = rows_of(half)
    assert {row.step for row in found} == {5, 6}
    assert not [d for d in decision_log() if d.name == "inspection.drift"]
    assert any(row.value is not None and row.value < 1 for row in found if row.measure == "drift_cosine")


def test_many_looks_leave_nothing(family: Family, probed: dict[str, Path], tmp_path: Path) -> None:
    class Watch(RecordingCallback):
        def analyze(self, data: InspectionInput) -> Findings:
            self.refs.append(weakref.ref(data.reading))
            return Findings(data.step)

        def __init__(self) -> None:
            super().__init__()
            self.refs: list[weakref.ref[HiddenStates]] = []

    watch = Watch()
    module, _ = train(family("llava"), probed, tmp_path, callbacks=[watch], tuning=MIDDLE, max_steps=30)
    gc.collect()
    assert len(watch.refs) == 31
    assert sum(ref() is not None for ref in watch.refs) <= 1  # the first, which drift is measured from
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.model.get_decoder().modules())
    assert hooks == 0


def test_data_without_pictures_is_refused_before_the_model_is_loaded(family: Family, tmp_path: Path) -> None:
    row = {"id": "1", "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}]}
    file = tmp_path / "train.json"
    file.write_text(json.dumps([row] * 4))
    with pytest.raises(UserError) as told:
        train(family("llava"), {"train": file, "val": file}, tmp_path, callbacks=[RecordingCallback()], max_steps=1)
    assert "prob" in str(told.value)


@pytest.mark.parametrize("wrong", [{"every": 0}, {"times": -1}, {"budget": 0.0}])
def test_a_wrong_schedule_says_what_is_right(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"schedule\."):
        Schedule(**wrong)  # type: ignore[arg-type]
