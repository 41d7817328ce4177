"""Nothing is patched for the whole process: after every verb, libraries' classes and registries are what they were."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import peft
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_mm.__main__ import main
from lightning_mm.models.export.export import export_full
from lightning_mm.models.export.model_card import Provenance
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.training.module import MMModule
from tests.helpers.cli import QUICK, Fit, inspect
from tests.helpers.data import Data, Family, batch_of
from tests.helpers.taught_models import KNOWN, Taught
from tests.helpers.training import POLICIES, train

LIBRARIES = ("transformers", "peft", "lightning", "torch.nn")
ATTRIBUTES = (FunctionType, classmethod, staticmethod, property)


def state_of_libraries() -> Iterator[tuple[str, object]]:
    """Every function of the libraries' loaded modules, every method of their classes, and the registries' entries."""
    for name, module in list(sys.modules.items()):
        if not name.startswith(LIBRARIES) or module is None:
            continue
        for key, value in list(vars(module).items()):
            if getattr(value, "__module__", None) != name:
                continue
            if isinstance(value, FunctionType):
                yield f"{name}.{key}", value
            elif isinstance(value, type):
                for attribute, part in list(vars(value).items()):
                    if isinstance(part, ATTRIBUTES):
                        yield f"{name}.{key}.{attribute}", part
    registries: Mapping[str, Mapping[Any, Any]] = {
        "attention": AttentionInterface._global_mapping,
        "masks": AttentionMaskInterface._global_mapping,
        "attention of this process": ALL_ATTENTION_FUNCTIONS._local_mapping,
        "masks of this process": ALL_MASK_ATTENTION_FUNCTIONS._local_mapping,
        "peft": peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        "models": transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING._extra_content,
    }
    for name, registry in registries.items():
        yield f"registry of {name}", tuple(sorted(map(str, registry)))
        for key, value in registry.items():
            yield f"registry of {name}: {key}", value


def hooks_of(model: torch.nn.Module) -> dict[str, int]:
    """Number of hooks of every module that has some."""
    counts = {name: len(part._forward_hooks) + len(part._forward_pre_hooks) for name, part in model.named_modules()}
    return {name: count for name, count in counts.items() if count}


@pytest.fixture
def unchanged() -> Iterator[None]:
    """The test fails if anything that was there before it is another object afterwards."""
    before = dict(state_of_libraries())
    yield
    after = dict(state_of_libraries())
    assert len(before) > 10_000
    changed = [name for name, value in before.items() if after.get(name) is not value and after.get(name) != value]
    assert not changed


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("policy", ["LoRAOnMiddle", "IntermediateOnly"])
def test_fit_and_export_leave_the_libraries_alone(policy: str, fit: Fit, probes: Path) -> None:
    callbacks = "[GeometryCallback,ProbingCallback,{class_path: CausalCallback, init_args: {count: 2}}]"
    options = ["--trainer.callbacks", callbacks, "--data.probes", str(probes), "--run.name", "run"]
    options += ["--model.activation_checkpointing", "true", "--model.tuning", policy]
    assert fit(*QUICK, *options) == 0
    assert main(["export", "runs/run", "--prove", "false"]) == 0
    assert main(["report", "runs/run"]) == 0


@pytest.mark.usefixtures("unchanged")
def test_inspect_trace_and_edit_leave_the_libraries_alone(
    known: Callable[[str], Taught], probes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = known("llava")
    export_full(one.model, one.encoder.processor, tmp_path / "model", Provenance("tiny"))
    (tmp_path / "picture.png").write_bytes(one.picture.read_bytes())
    rows = [
        {
            "id": word,
            "question": f"Which is {word} thing?",
            "image": "picture.png",
            "constraint": word,
            "answer": answer,
        }
        for word, answer in KNOWN.items()
    ]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    assert inspect(tmp_path, "model", "--probes", str(probes)) == 0
    assert main(["trace", "model", "--questions", "questions.json", "--parts", "[trace,knockout,flow]"]) == 0
    edits = [{**rows[0], "new_answer": rows[1]["answer"]}]
    (tmp_path / "edits.json").write_text(json.dumps(edits))
    assert main(["edit", "model", "--edits", "edits.json", "--layer", "1", "--steps", "5"]) == 0


@pytest.mark.usefixtures("unchanged")
def test_a_model_runs_its_own_code_again_after_a_fit(family: Family, data: Data, tmp_path: Path) -> None:
    """Nothing stays on the trained model, and another one of its class computes as if there had been no fit."""
    other = load_model(Backbone(path=str(family("llava")))).eval()
    batch = batch_of(family("llava"), data)
    with torch.no_grad():
        expected = other(**batch.inputs).logits
    module, _ = train(
        family("llava"), data, tmp_path, tuning=POLICIES["intermediate"], max_steps=1, activation_checkpointing=True
    )
    changed = [name for name, part in module.model.named_modules() if "forward" in part.__dict__]
    assert not changed
    assert hooks_of(module.model) == hooks_of(other)  # transformers itself hooks blocks whose outputs it collects
    with torch.no_grad():
        assert torch.equal(other(**batch.inputs).logits, expected)


class Stop(Callback):
    """Ends a fit in the middle of a step."""

    def on_train_batch_end(self, *_: object) -> None:
        raise RuntimeError("stopped")


def test_a_fit_that_fails_leaves_the_model_alone(family: Family, data: Data, tmp_path: Path) -> None:
    """Lightning calls no teardown hook then."""
    modules: list[MMModule] = []
    with pytest.raises(RuntimeError, match="stopped"):
        train(
            family("llava"),
            data,
            tmp_path,
            tuning=POLICIES["intermediate"],
            callbacks=[Stop()],
            max_steps=2,
            on_start=modules.append,
        )
    (module,) = modules
    assert not [name for name, part in module.model.named_modules() if "forward" in part.__dict__]
