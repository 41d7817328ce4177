"""The looks inside transformers' Trainer and TRL's SFTTrainer: training is bit-identical with and without them."""

from pathlib import Path
from typing import Any

import pytest

from lightning_mm.callbacks import CausalCallback, DriftCallback, GeometryCallback, ProbingCallback, Schedule
from lightning_mm.callbacks.hf import InspectionCallback
from lightning_mm.core.errors import UserError
from tests.helpers import strangers
from tests.helpers.data import Family
from tests.helpers.inspection import rows_of

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 and TRL 1.16 ask transformers 5.23 and torch 2.13 by older names.
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore::UserWarning",
)
transformers = pytest.importorskip("transformers")
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


def train(folder: Path, out: Path, callbacks: list[Any], lora: bool = False, **options: Any) -> Any:
    model, processor = strangers.load(folder, lora)
    arguments = transformers.TrainingArguments(
        output_dir=str(out), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
        learning_rate=1e-2, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, strangers.Collate(processor), strangers.rows(), callbacks=callbacks
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "options", [{}, {"lora": True, "bf16": True, "gradient_checkpointing": True}], ids=["plain", "adapters"]
)
def test_transformers_trainer_is_bit_identical(
    options: dict[str, Any], family: Family, probes: Path, tmp_path: Path
) -> None:
    _, processor = strangers.load(family("llava"))
    alone = train(family("llava"), tmp_path / "a", [], **options)
    inspection = looks(probes, processor)
    seen = train(family("llava"), tmp_path / "b", [inspection], **options)
    assert logged(seen) == logged(alone)
    strangers.assert_equal_weights(seen.model, alone.model)
    assert seen.model.training == alone.model.training
    assert inspection.run is not None
    assert inspection.run.path == tmp_path / "b" / "inspection"
    found = rows_of(inspection.run.path)
    assert {row.step for row in found} == {0, 2, 3}
    assert {row.analysis for row in found} == {"probing", "geometry", "drift", "causal"}
    assert inspection.run.report.is_file()
    assert len(seen.state.log_history) == len(alone.state.log_history) + 3, "one entry per look"


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
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=processor,
            callbacks=callbacks, peft_config=peft.LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj"]),
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
