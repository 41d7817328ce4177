"""What a user would write with the public names: checked by ``mypy --strict`` (scripts/test.sh), and run by a test.

Data flow: folder of a model, files of conversations, probes, questions and edits -> every verb -> what it returns.
"""

import sys
from pathlib import Path
from typing import assert_type

import lightning as L
from torch import nn

import lightning_mm as mm


def main(model: str, work: Path) -> None:
    """Use every public function once."""
    data = mm.MMDataModule(train=str(work / "train.json"), probes=str(work / "probes.json"), num_workers=0)
    cost = mm.plan(model, mm.LoRAOnMiddle(layers="25%-50%"), data, device="h200", compare=False)
    assert_type(cost.own.memory.total, float)
    chosen = mm.select_layers(model, data, auto=mm.AutoRange(batches=2, resamples=2), budget=2)
    assert_type(chosen.chosen.layers, tuple[int, ...])
    policy: mm.TuningPolicy = mm.IntermediateOnly(layers=chosen.expression)
    module = mm.MMModule(mm.Backbone(path=model), policy, mm.OptimizerSettings(lr=1e-3))
    data.processor = model
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.fit(module, datamodule=data)
    exported = mm.export_model(module, work / "exported", verify=False)
    assert_type(exported, Path)
    seen = mm.inspect(model, against=exported, data=data, images=12, select=False, measures=["overlap"])
    assert_type([row.value for row in seen.rows], list[float | None])
    caused = mm.trace(model, work / "questions.json", study=mm.StudyConfig(parts=("flow",)), out=work / "traced")
    assert_type(caused.report, Path | None)
    edited = mm.edit(model, work / "edits.json", layer=1, config=mm.EditConfig(steps=2), control=False)
    assert_type(edited.layer, int)
    layers = mm.resolve_layers("last:2", 4)
    assert_type(layers, tuple[int, ...])
    assert_type(mm.apply_policy(nn_model(module), mm.Full()), mm.TuningPlan)
    print(cost, seen, caused, edited, mm.write_report(work / "traced"), sep="\n")


def nn_model(module: mm.MMModule) -> nn.Module:
    """The model of transformers inside a module."""
    return module.mm.model


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
