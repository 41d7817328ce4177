"""Fit, look inside, ask and export: python examples/fit_your_model.py [FOLDER]

FOLDER holds model/, train.json, val.json and probes.json; a tiny model and tiny data are made there if it does not exist.
"""

import sys
from pathlib import Path

import lightning as L

from lightning_mm import GeometryCallback, IntermediateOnly, MMDataModule, MMModule, ProbingCallback, export_model
from lightning_mm.testing import build_tiny, build_tiny_data


def main(folder: Path) -> None:
    """Train the middle of the model for four steps."""
    if not folder.exists():
        build_tiny("llava", folder / "model")
        build_tiny_data(folder)

    # A folder, a hub name or a loaded model; only decoder blocks between a quarter and half of the depth train.
    module = MMModule(str(folder / "model"), IntermediateOnly("25%-50%"), lr=1e-3)
    data = MMDataModule(
        train=str(folder / "train.json"),
        val=str(folder / "val.json"),
        probes=str(folder / "probes.json"),
        batch_size=4,
        num_workers=0,
    )
    trainer = L.Trainer(
        accelerator="auto",
        max_steps=4,
        callbacks=[ProbingCallback(), GeometryCallback(measures=["overlap", "cka"])],
    )
    trainer.fit(module, datamodule=data)

    print(module.census.policy, "of", module.census.num_layers, "layers")
    question = data.samples("val")[0]
    print(module.generate(question.images[0], "What colour is this thing?"))
    print(export_model(module, folder / "export"))  # transformers loads it without this package


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tiny"))
