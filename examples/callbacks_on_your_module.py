"""Look inside a LightningModule of your own while it trains: python examples/callbacks_on_your_module.py [FOLDER]

FOLDER holds model/, train.json and probes.json; a tiny model and tiny data are made there if it does not exist.
"""

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from lightning_mm import DriftCallback, GeometryCallback, ProbingCallback
from lightning_mm.testing import build_tiny, build_tiny_data


class YourModule(L.LightningModule):
    """Any module that holds a multimodal LLM of transformers somewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.backbone = AutoModelForImageTextToText.from_pretrained(path)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Loss of transformers."""
        loss: torch.Tensor = self.backbone(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(folder: Path) -> None:
    """Train for four steps, with a look before, between and after."""
    if not folder.exists():
        build_tiny("llava", folder / "model")
        build_tiny_data(folder)
    processor = AutoProcessor.from_pretrained(folder / "model")

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [row["conversations"][0]["value"] + row["conversations"][1]["value"] for row in rows]
        images = [Image.open(folder / row["image"]) for row in rows]
        batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    loader = DataLoader(json.loads((folder / "train.json").read_text()), batch_size=4, collate_fn=collate)
    # Which part is the model, its processor and the pictures to look with: said once, it holds for all of them.
    probing = ProbingCallback(model="backbone", processor=processor, probes=folder / "probes.json")
    callbacks: list[L.Callback] = [probing, GeometryCallback(measures=["cka"]), DriftCallback()]
    L.Trainer(max_steps=4, log_every_n_steps=1, callbacks=callbacks).fit(YourModule(folder / "model"), loader)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tiny"))
