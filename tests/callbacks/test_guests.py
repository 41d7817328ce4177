"""The callbacks on a LightningModule that is not ours: training bit-identical, the same rows as with our module."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_mm.analysis.read import measure_hidden_states, read_hidden_states
from lightning_mm.callbacks import CausalCallback, DriftCallback, GeometryCallback, ProbingCallback, Schedule
from lightning_mm.callbacks.subject import Given, guest_subject
from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.core.layer_table import LayerRow
from lightning_mm.data.probe_sets.given import open_probes
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.models.guest import model_at, open_model, the_only_model
from lightning_mm.tuning import Full
from tests.helpers import strangers
from tests.helpers.data import Data, Family
from tests.helpers.inspection import EVERY, RecordingCallback, rows_of
from tests.helpers.training import SaveAt, train

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 asks transformers 5.23 by an older name.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
)
ENDS = Schedule(times=0, budget=None)


def all_four(processor: Any, probes: Path, schedule: Schedule = EVERY) -> list[L.Callback]:
    return [
        ProbingCallback(schedule, model="holder.backbone", processor=processor, probes=str(probes)),
        GeometryCallback(schedule),
        DriftCallback(schedule),
        CausalCallback(schedule, questions=str(strangers.questions(probes)), count=2, parts=("ablation",)),
    ]


@pytest.mark.parametrize(
    "options", [{}, {"lora": True, "precision": "bf16-mixed", "accumulate_grad_batches": 2}], ids=["plain", "adapters"]
)
def test_a_strangers_training_is_bit_identical(
    options: dict[str, Any], family: Family, probes: Path, tmp_path: Path
) -> None:
    _, processor = strangers.load(family("llava"))
    alone, _ = strangers.fit(family("llava"), tmp_path / "a", steps=3, **options)
    callbacks = all_four(processor, probes, Schedule(every=2, budget=None))
    seen, _ = strangers.fit(family("llava"), tmp_path / "b", callbacks, steps=3, **options)
    assert seen.losses == alone.losses
    strangers.assert_equal_weights(seen, alone)
    folder = tmp_path / "b" / "inspection"
    found = rows_of(folder)
    assert {row.step for row in found} == {0, 2, 3}
    assert {row.analysis for row in found} == {"probing", "geometry", "drift", "causal"}
    assert any(row.measure == "transplant" for row in found)
    assert (folder / "report.html").is_file()
    problems = [p for row in json.loads((folder / "inspections.json").read_text()) for p in row["problems"]]
    assert not [p for p in problems if "failed" in p or "nothing was read" in p or "no transplant" in p], problems
    hooks = [[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in each.modules()] for each in (seen, alone)]
    assert hooks[0] == hooks[1], "transformers' own, and no other"


def test_rows_are_those_of_our_module_and_of_a_bare_loop(
    family: Family, probed: Data, probes: Path, tmp_path: Path
) -> None:
    """Before the first step the weights are equal: so is every row."""
    train(
        family("llava"), probed, tmp_path / "ours", tuning=Full(), max_steps=1, batch_size=4,
        callbacks=[ProbingCallback(ENDS), GeometryCallback(ENDS)],
    )  # fmt: skip
    _, processor = strangers.load(family("llava"))
    callbacks = [ProbingCallback(ENDS, processor=processor, probes=str(probes)), GeometryCallback(ENDS)]
    strangers.fit(family("llava"), tmp_path / "theirs", callbacks, steps=1)

    def first(folder: Path) -> list[LayerRow]:
        return [row for row in rows_of(folder) if row.step == 0]

    expected = first(tmp_path / "ours")
    assert expected == first(tmp_path / "theirs" / "inspection")
    model, _ = strangers.load(family("llava"))
    states = read_hidden_states(model, processor, probes, batch_size=4)
    bare = {row.key: row.value for row in measure_hidden_states(states).rows}
    written = {row.key: row.value for row in expected if row.analysis == "geometry"}
    assert bare.keys() == written.keys()
    for key, value in written.items():
        assert bare[key] == (None if value is None else pytest.approx(value, rel=1e-6, abs=1e-9)), key


def test_two_fits_have_two_folders(family: Family, probes: Path, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    caplog.set_level("INFO", logger="lightning_mm")
    _, processor = strangers.load(family("llava"))
    decision_log().clear()
    for _ in range(2):
        callback = GeometryCallback(ENDS, measures=["cka"], processor=processor, probes=str(probes))
        _, trainer = strangers.fit(family("llava"), tmp_path, [callback], steps=1)
    assert (tmp_path / "inspection" / "report.html").is_file()
    assert (tmp_path / "inspection-2" / "report.html").is_file()
    assert f"report: {tmp_path / 'inspection-2' / 'report.html'}" in capsys.readouterr().out + caplog.text
    decisions = json.loads((tmp_path / "inspection" / "decisions.json").read_text())
    assert ("callbacks.model", "holder.backbone") in [(each["name"], each["value"]) for each in decisions]
    census = json.loads((tmp_path / "inspection" / "census.json").read_text())
    assert census["layers"]["trained"] == [0, 1, 2, 3]
    assert trainer.global_step == 1


def test_a_resumed_run_takes_over_what_was_found(family: Family, probes: Path, tmp_path: Path) -> None:
    _, processor = strangers.load(family("llava"))

    def look() -> DriftCallback:
        return DriftCallback(EVERY, processor=processor, probes=str(probes))

    with pytest.raises(SystemExit):  # as Ctrl-C ends a run
        strangers.fit(family("llava"), tmp_path, [look(), SaveAt(2, tmp_path / "at.ckpt")], steps=3)
    assert (tmp_path / "inspection" / "report.html").is_file(), "a run that is stopped has its report too"
    strangers.fit(family("llava"), tmp_path, [look()], steps=3, ckpt_path=tmp_path / "at.ckpt")
    assert {row.step for row in rows_of(tmp_path / "inspection-2")} == {1, 2, 3}, (
        "what was found before the stop, and after"
    )


def test_a_model_is_found_in_lists_and_dictionaries(family: Family, probes: Path) -> None:
    """A plain dictionary keeps its model out of the module's parts: its modes are kept all the same."""
    model, processor = strangers.load(family("llava"))
    root = Two(nn.Linear(2, 2))
    root.plain = {"parts": [nn.Linear(2, 2), model]}  # type: ignore[assignment]
    assert model_at(Two(model), "models.0") is model
    assert model_at(root, "plain.parts.1") is model
    for path in ("plain.parts.2", "plain.parts.x", "plain.none"):
        with pytest.raises(UserError, match="does not exist"):
            model_at(root, path)
    rejected = RejectedSamples(1.0)
    probe_set = open_probes(str(probes), rejected)
    subject = guest_subject(root, Given("plain.parts.1", processor), probe_set, rejected, nullcontext)
    with subject.evaluating():
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


class Two(L.LightningModule):
    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)


def test_what_cannot_be_found_is_refused_in_one_line(family: Family, probes: Path, tmp_path: Path) -> None:
    model, processor = strangers.load(family("llava"))
    with pytest.raises(UserError, match="nothing to look inside"):
        strangers.fit(family("llava"), tmp_path, [RecordingCallback()])
    for given, message in (
        ({"model": "holder.nothing", "processor": processor}, "no multimodal model at 'holder.nothing'"),
        ({"processor": None}, "no processor"),
        ({"processor": processor.tokenizer}, "cannot be trained on pictures and text"),
        ({"model": 3, "processor": processor}, "model= was given a int"),
    ):
        callback = GeometryCallback(ENDS, probes=str(probes), **given)
        with pytest.raises(UserError, match=message):
            strangers.fit(family("llava"), tmp_path, [callback])
    with pytest.raises(UserError, match=r'holds 2 multimodal models(.|\n)*model="models.0"'):
        the_only_model(Two(model, model.__class__(model.config)))
    with pytest.raises(UserError, match="holds no multimodal model"):
        the_only_model(Two(nn.Linear(2, 2)))
    text = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    with pytest.raises(UserError, match=r"models\.0 is a LlamaForCausalLM, which takes no pictures"):
        the_only_model(Two(text))
    with pytest.raises(UserError, match="Choose a model that takes pictures"):
        open_model(text, processor)
    with pytest.raises(UserError, match="no output head"):
        open_model(model.model, processor)
    callbacks = [ProbingCallback(probes=str(probes), processor=processor), GeometryCallback(probes="other.json")]
    with pytest.raises(UserError, match="different probes"):
        strangers.fit(family("llava"), tmp_path, callbacks)
    with pytest.raises(UserError, match="CausalCallback has no questions"):
        strangers.fit(family("llava"), tmp_path, [CausalCallback(probes=str(probes), processor=processor)])
