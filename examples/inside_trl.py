"""Look inside while TRL's SFTTrainer trains (transformers' Trainer likewise).

Needs `pip install trl`. Usage: python examples/inside_trl.py [FOLDER]
FOLDER holds model/, train.json and probes.json; tiny ones are made if it does not exist.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset, Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from lightning_mm import GeometryCallback, InspectionCallback, IntermediateOnly, ProbingCallback, apply_policy
from lightning_mm.testing import build_tiny, build_tiny_data


def main(folder: Path) -> None:
    """Train the middle layers by TRL, with a look before and after."""
    if not folder.exists():
        build_tiny("llava", folder / "model")
        build_tiny_data(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    processor = AutoProcessor.from_pretrained(folder / "model")
    apply_policy(model, IntermediateOnly("25%-50%"))  # the Trainer optimizes what requires gradients

    rows = [
        {
            "images": [str(folder / row["image"])],
            "prompt": [{"role": "user", "content": row["conversations"][0]["value"].replace("<image>\n", "")}],
            "completion": [{"role": "assistant", "content": row["conversations"][1]["value"]}],
        }
        for row in json.loads((folder / "train.json").read_text())
    ]
    dataset = Dataset.from_list(rows).cast_column("images", [Image()])
    looks = [ProbingCallback(), GeometryCallback(measures=["overlap", "cka"])]
    inspection = InspectionCallback(looks, probes=folder / "probes.json", processor=processor)
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=4,
        per_device_train_batch_size=4,
        max_length=None,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    trainer = SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=processor)
    inspection.add_to(trainer)  # or callbacks=[inspection]; so, trackers such as TensorBoard and W&B get its values
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tiny"))
