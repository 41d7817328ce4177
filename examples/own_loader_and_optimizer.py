"""Your own DataLoader, optimizer and schedule in a plain L.Trainer: python examples/own_loader_and_optimizer.py [FOLDER]

FOLDER holds model/, train.json and its pictures; a tiny model and tiny data are made there if it does not exist.
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

from lightning_mm import LoRA, LoRAOnMiddle, MMModule
from lightning_mm.testing import build_tiny, build_tiny_data


def main(folder: Path) -> None:
    """Train LoRA adapters on the middle layers with batches of one's own."""
    if not folder.exists():
        build_tiny("llava", folder / "model")
        build_tiny_data(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    processor = AutoProcessor.from_pretrained(folder / "model")
    processor.tokenizer.padding_side = "right"
    rows = json.loads((folder / "train.json").read_text())

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """What the processor returns, with labels: -100 is not learned."""
        turns = [row["conversations"][:2] for row in rows]
        texts = [f"{question['value']} {answer['value']}" for question, answer in turns]
        images = [Image.open(folder / row["image"]) for row in rows]
        batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {**batch, "labels": labels.masked_fill(labels == processor.image_token_id, -100)}

    def optimizer(parameters: list[dict[str, Any]]) -> dict[str, Any]:
        """What ``configure_optimizers`` may return; groups are named by region."""
        sgd = torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
        return {"optimizer": sgd, "lr_scheduler": torch.optim.lr_scheduler.StepLR(sgd, 10)}

    module = MMModule(model, LoRAOnMiddle("25%-75%", lora=LoRA(r=4)), optimizer=optimizer, processor=processor)
    loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)
    L.Trainer(max_epochs=1).fit(module, train_dataloaders=loader)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tiny"))
