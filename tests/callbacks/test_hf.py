"""The looks inside transformers' Trainer and TRL's SFTTrainer: training is bit-identical with and without them."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_mm.callbacks import CausalCallback, DriftCallback, GeometryCallback, ProbingCallback, Schedule
from lightning_mm.callbacks.hf import InspectionCallback
from lightning_mm.core.errors import UserError
from lightning_mm.data.probe_sets.given import Probes
from tests.helpers import strangers
from tests.helpers.data import Family
from tests.helpers.inspection import rows_of
from tests.helpers.wandb_files import history, records

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 and TRL 1.16 ask transformers 5.23 by older names.
    "ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning",
)
LOOKS = Schedule(every=2, budget=None)


def looks(probes: Path, processor: Any, causal: bool = True) -> InspectionCallback:
    callbacks: list[Any] = [ProbingCallback(LOOKS), GeometryCallback(LOOKS), DriftCallback(LOOKS)]
    if causal:
        asked = str(strangers.questions(probes))
        callbacks.append(CausalCallback(LOOKS, questions=asked, count=2, parts=("ablation",), transplant=False))
    return InspectionCallback(callbacks, probes=str(probes), processor=processor)


def logged(trainer: Any) -> list[dict[str, Any]]:
    """What the Trainer itself logged, without its clock."""
    return [
        {key: value for key, value in row.items() if not key.endswith(("_runtime", "_per_second"))}
        for row in trainer.state.log_history
        if not any(key.startswith("inspect") for key in row)
    ]


@pytest.mark.parametrize(
    "options",
    [{"eval_strategy": "steps", "eval_steps": 2}, {"lora": True, "bf16": True, "gradient_checkpointing": True}],
    ids=["evaluated", "adapters"],
)
def test_transformers_trainer_is_bit_identical(
    options: dict[str, Any], family: Family, probes: Path, tmp_path: Path
) -> None:
    _, processor = strangers.load(family("llava"))
    alone = strangers.train_with_transformers(family("llava"), tmp_path / "a", **options)
    adapters = "lora" in options
    inspection = looks(probes, processor, causal=not adapters)
    seen = strangers.train_with_transformers(family("llava"), tmp_path / "b", [inspection], **options)
    assert logged(seen) == logged(alone)
    strangers.assert_equal_weights(seen.model, alone.model)
    assert seen.model.training == alone.model.training
    assert inspection.run is not None
    assert inspection.run.path == tmp_path / "b" / "inspection"
    found = rows_of(inspection.run.path)
    assert {row.step for row in found} == {0, 2, 3}
    assert {row.analysis for row in found} == {"probing", "geometry", "drift", *(() if adapters else ("causal",))}
    assert inspection.run.report.is_file()
    assert len(seen.state.log_history) == len(alone.state.log_history) + 3, "one entry per look"


def test_a_resumed_training_is_bit_identical_and_has_a_folder_of_its_own(
    family: Family, probes: Path, tmp_path: Path
) -> None:
    # Adapters: Trainer of transformers 5.23 saves a whole LLaVA under names that it does not load again.
    whole = strangers.train_with_transformers(family("llava"), tmp_path / "a", lora=True)
    _, processor = strangers.load(family("llava"))
    twelve = Probes(probes, max_pictures=12, batch_size=3)
    for resume, folder in ((False, "inspection"), (True, "inspection-2")):
        look = DriftCallback(Schedule(every=1, budget=None))
        inspection = InspectionCallback([look], probes=twelve, processor=processor)
        trainer = strangers.make_trainer(
            family("llava"), tmp_path / "b", [inspection], lora=True, save_strategy="steps", save_steps=2
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2") if resume else None)
        strangers.assert_equal_weights(trainer.model, whole.model)
        assert inspection.run is not None
        assert inspection.run.path == tmp_path / "b" / folder
        assert {row.step for row in rows_of(inspection.run.path)} == {1, 2, 3}, "what was found before, and after"
        assert {row.n for row in rows_of(inspection.run.path)} == {12}


def test_trackers_of_the_trainer_have_the_values(
    family: Family, probes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    _, processor = strangers.load(family("llava"))
    ends = Schedule(times=0, budget=None)
    inspection = InspectionCallback([GeometryCallback(ends, ["cka"])], probes=str(probes), processor=processor)
    trainer = strangers.make_trainer(family("llava"), tmp_path / "out", report_to=["wandb"], logging_steps=2)
    inspection.add_to(trainer)
    trainer.train()
    wandb.finish()
    written = [row for row in history(records(tmp_path)) if any("inspect" in key for key in row)]
    assert [row["train/global_step"] for row in written] == ["0", "3"]
    in_history = [row for row in trainer.state.log_history if any(key.startswith("inspect") for key in row)]
    for sent, kept in zip(written, in_history, strict=True):
        metrics = {key: value for key, value in kept.items() if key not in ("step", "epoch")}
        assert {key: json.loads(sent[f"train/{key}"]) for key in metrics} == metrics


def test_trl_is_bit_identical(family: Family, probes: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    peft = pytest.importorskip("peft")

    def run(out: Path, callbacks: list[Any]) -> Any:
        model, processor = strangers.load(family("llava"))
        rows = [
            {
                "images": [row["image"]],
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["answer"]},
                ],
            }
            for row in strangers.rows()
        ]
        arguments = trl.SFTConfig(
            output_dir=str(out), max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-2, max_length=None, bf16=False,
            dataloader_pin_memory=False, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=processor,
            eval_dataset=datasets.Dataset.from_list(rows[:2]), callbacks=callbacks,
            peft_config=peft.LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj"]),
        )  # fmt: skip
        trainer.train()
        return trainer

    alone = run(tmp_path / "a", [])
    inspection = looks(probes, None, causal=False)
    seen = run(tmp_path / "b", [inspection])
    assert logged(seen) == logged(alone)
    strangers.assert_equal_weights(seen.model, alone.model)
    assert inspection.run is not None
    assert {row.step for row in rows_of(inspection.run.path)} == {0, 2}
    assert inspection.run.report.is_file()


def test_nothing_to_look_for_is_refused() -> None:
    with pytest.raises(UserError, match="looks for nothing"):
        InspectionCallback([])
    with pytest.raises(UserError, match="two of one kind"):
        InspectionCallback([DriftCallback(), DriftCallback()])
