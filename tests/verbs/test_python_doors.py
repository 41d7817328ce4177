"""The verbs called from Python: on models in memory, which stay as they were, with rows in memory, and mistaken."""

import json
import logging
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import lightning_mm as mm
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.training.checkpoint_file import KEY
from lightning_mm.tuning import apply
from lightning_mm.verbs.export_model import _say_step
from tests.helpers.data import Data, Family
from tests.helpers.taught_models import KNOWN, Taught, known

__all__ = ["known"]

TOO_OLD = "Found an incompatible version of torchao, use a version >= 0.22.0"
AUTO = mm.AutoRange(batches=2, resamples=2)


def loaded(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder)


def row(one: Taught, word: str, **more: Any) -> dict[str, Any]:
    question = {"id": word, "question": f"Which is {word} thing?", "constraint": word, "answer": KNOWN[word]}
    return {**question, "image": one.picture, **more}


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a guest could change."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "gradients": [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "forwards": [vars(module).get("forward") for module in model.modules()],
        "hooks": [hook for module in model.modules() for hook in hooks_of_ours(module)],
        "generators": torch.get_rng_state().clone(),
    }


def hooks_of_ours(module: nn.Module) -> list[Any]:
    """Hooks that transformers did not put there itself, as it does in the first forward pass of some towers."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("transformers")]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def test_a_model_in_memory_is_read_like_its_folder_and_given_back(family: Family, data: Data, probes: Path) -> None:
    folder = family("llava")
    model = loaded(folder).train()
    first = next(model.parameters()).requires_grad_(False)
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)
    before = state_of(model)
    options: dict[str, Any] = {"probes": probes, "data": data["train"], "images": 12, "auto": AUTO, "text_only": False}
    seen = mm.inspect(model, measures="overlap", **options)
    assert same(before, state_of(model))
    assert not first.requires_grad
    assert seen.run is None
    again = mm.inspect(folder, measures=["overlap"], **options)
    assert [r.value for r in seen.rows] == [r.value for r in again.rows]
    assert any(r.value is not None for r in seen.rows)
    assert seen.selection is not None
    assert again.selection is not None
    assert seen.selection.to_dict() == again.selection.to_dict()
    assert {"rgn", "fisher"} <= seen.selection.to_dict()["criteria"].keys()
    assert len(seen.to_pandas()) == len(seen.rows)
    assert "overlap" in str(seen)
    assert "overlap" in seen._repr_html_()


def test_a_data_module_stays_as_it_was(family: Family, data: Data, probes: Path) -> None:
    own = mm.MMDataModule(train=str(data["train"]), probes=str(probes), batch_size=3)
    selection = mm.select_layers(family("llava"), own, auto=AUTO, budget=2, images=12)
    assert len(selection.chosen.layers) == 2
    assert (own.batch_size, own.eval_batch_size, own.processor, len(own.rejected_samples)) == (3, 3, "", 0)


def test_rows_in_memory_are_traced_and_edited(known: Callable[[str], Taught], tmp_path: Path) -> None:
    one = known("llava")
    processor = AutoProcessor.from_pretrained(one.folder)
    before = state_of(one.model)
    study = mm.StudyConfig(parts=("flow",))
    found = mm.trace(one.model, (row(one, word) for word in KNOWN), processor=processor, study=study)
    assert sum(answer.right for answer in found.answers) == len(KNOWN)
    assert found.profile("flow", "constraint->last").keys() == {0, 1, 2, 3}
    asked = [one.question(word) for word in KNOWN]
    same_questions = mm.trace(one.model, asked, processor=one.folder, study=study)
    assert [answer.encoded.question for answer in same_questions.answers] == asked
    edits = [row(one, "d", new_answer="e"), row(one, "f", new_answer="i")]
    config = mm.EditConfig(steps=2)
    made = mm.edit(one.model, edits, layer=1, config=config, control=False, processor=processor, out=tmp_path / "run")
    assert same(before, state_of(one.model))
    assert len(made.edits) == 1, "both in one weight"
    assert made.report is not None
    assert made.report.is_file()
    assert json.loads((tmp_path / "run/edits.json").read_text()) == json.loads(json.dumps(made.details))


def test_a_plan_leaves_out_what_cannot_be_built(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(*_: Any) -> None:
        raise ImportError(TOO_OLD)

    monkeypatch.setattr(apply, "add_lora", too_old)
    folder = family("llava")
    cost = mm.plan(folder, mm.Full(), device="h200", batch_size=2, precision="bf16-mixed", max_steps=10)
    assert [one.plan.policy.partition("(")[0] for one in cost.estimates][:3] == [
        "Full",
        "IntermediateOnly",
        "ConnectorOnly",
    ]
    reasons = {name.partition("(")[0]: reason for name, reason in cost.left_out.items()}
    assert reasons == {
        "LoRAOnMiddle": f"ImportError: {TOO_OLD}",
        "RandomLayers": "it trains the weights of LateLayers(budget='25%-50%')",  # one of four layers
    }
    assert "Without LoRAOnMiddle" in str(cost)
    assert cost.steps == 10
    assert any(decision.name == "plan.lengths" for decision in cost.decisions)
    with pytest.raises(mm.UserError, match=r"use a version >= 0\.22\.0") as told:
        mm.plan(folder, mm.LoRAOnMiddle(), device="h200")
    assert "LoRAOnMiddle" in told.value.what


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m, p: mm.inspect("./no/such/model", probes=p), "no model folder or hub name"),
        (lambda m, p: mm.inspect(Path("nowhere"), probes=p), "no model folder or hub name"),
        (lambda m, p: mm.inspect(None, probes=p), "None is no model"),
        (lambda m, p: mm.inspect(nn.Linear(2, 2), probes=p), "Linear is no model of transformers"),
        (lambda m, p: mm.inspect(m), "nothing to probe with"),
        (lambda m, p: mm.inspect(m, probes="nowhere.json"), "No file nowhere.json"),
        (lambda m, p: mm.inspect(m, probes=[1, 2]), "probes cannot be"),
        (lambda m, p: mm.inspect(m, probes=p, measures="ckaa"), "no geometric measure 'ckaa'"),
        (lambda m, p: mm.inspect(m, probes=p, images=1), "images is 1"),
        (lambda m, p: mm.inspect(m, probes=p, batch_size=0), "batch_size is 0"),
        (lambda m, p: mm.select_layers(m, probes=p, budget="half"), "budget is 'half'"),
        (lambda m, p: mm.select_layers(m, {"train": p}), "data cannot be"),
        (lambda m, p: mm.trace(m, ["What is it?"]), "questions cannot be read"),
        (lambda m, p: mm.trace(m, []), "questions is empty"),
        (lambda m, p: mm.trace(m, 3), "questions cannot be read"),
        (lambda m, p: mm.trace(m, "nowhere.json"), "No file nowhere.json"),
        (lambda m, p: mm.trace(m, p, prompt="Hello"), "Nothing would be asked"),
        (lambda m, p: mm.trace(m, p, against=m), "nothing to ask the hybrids"),
        (lambda m, p: mm.edit(m, []), "edits is empty"),
        (lambda m, p: mm.edit(m, p, apply="all"), "apply is 'all'"),
        (lambda m, p: mm.edit(m, [{"question": "What?"}]), "holds no edit that can be made"),
        (lambda m, p: mm.plan(m, mm.Full), "Full is no tuning policy"),
        (lambda m, p: mm.plan(m, p), "is no tuning policy"),
        (lambda m, p: mm.plan(m, mm.Full(), "nowhere.json"), "No data file nowhere.json"),
        (lambda m, p: mm.plan(m, mm.Full(), supervised=0), "supervised is 0"),
        (lambda m, p: mm.plan(m, mm.Full(), device="tpu", text_tokens=9), "tpu is not known"),
        (lambda m, p: mm.plan(m, mm.IntermediateOnly(layers="40-50"), device="h200"), "cannot be resolved"),
        (lambda m, p: mm.export_model("nowhere"), "no run directory"),
        (lambda m, p: mm.export_model(m), "is no run"),
        (lambda m, p: mm.export_model(m, format="gguf"), "format is 'gguf'"),
        (lambda m, p: mm.export_model(mm.MMModule(mm.Backbone(path=str(m)), mm.Full()), "out"), "has no model yet"),
        (lambda m, p: mm.resolve_layers(None, 4), "cannot be resolved"),
        (lambda m, p: mm.resolve_layers("all", m), "num_layers is"),
        (lambda m, p: mm.write_report("nowhere"), "no run directory"),
    ],
)
def test_a_mistake_is_one_line(
    call: Callable[[Path, Path], Any],
    told: str,
    family: Family,
    probes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mm.UserError, match=told):
        call(family("llava"), probes)


def test_an_export_says_its_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDirectory.create(tmp_path, "run")
    run.checkpoints.mkdir()
    for name, step in (("best", 4), ("last", 8)):
        torch.save({KEY: {}, "global_step": step}, run.checkpoints / f"{name}.ckpt")
    with caplog.at_level(logging.INFO, "lightning_mm"):
        _say_step(run, run.checkpoints / "last.ckpt")
    assert [(r.levelname, r.message) for r in caplog.records] == [("INFO", "exporting step 8 of run run (last.ckpt)")]
    run.metrics.write_text("step,train/loss,val/loss\n9,0.5,\n12,,0.25\n")
    caplog.clear()
    _say_step(run, run.checkpoints / "best.ckpt")
    _say_step(run, run.checkpoints / "last.ckpt")
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [f"step {step} of run run is exported; the run went on to step 10" for step in (4, 8)]


def test_the_script_of_a_user_runs(
    known: Callable[[str], Taught], data: Data, probes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that mypy checks."""
    one = known("llava")
    one.model.save_pretrained(tmp_path / "model")
    AutoProcessor.from_pretrained(one.folder).save_pretrained(tmp_path / "model")
    work = data["train"].parent
    for file in probes.parent.iterdir():
        (work / file.name).write_bytes(file.read_bytes())
    (work / probes.name).rename(work / "probes.json")
    (work / "picture.png").write_bytes(one.picture.read_bytes())
    rows = [row(one, word, image="picture.png") for word in KNOWN]
    (work / "questions.json").write_text(json.dumps(rows))
    (work / "edits.json").write_text(json.dumps([{**rows[2], "new_answer": "e"}]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["user_script.py", str(tmp_path / "model"), str(work)])
    runpy.run_path(str(Path(__file__).with_name("user_script.py")), run_name="__main__")
    assert (work / "traced" / "report.html").is_file()
    assert (work / "exported" / "config.json").is_file()
