"""Tiny data with images: rows of conversations and of probes as files, and batches of them.

Data flow: random draws with a seed -> images and JSON in a temporary folder -> (``MMDataModule``) -> ``Batch``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.testing.tiny_data import make_probe_rows as make_probe_rows
from lightning_mm.testing.tiny_data import make_rows as make_rows

Family = Callable[[str], Path]
"""The fixture ``family``: the folder of a tiny model, by the name of its family."""
Data = dict[str, Path]
"""The fixture ``data``: the data file of each split."""
FAMILIES = ("llava", "qwen2_5_vl", "smolvlm", "internvl", "gemma3")
"""The families that every policy is tried on."""

TALKS = (
    ("What is it?", "A cat."),
    ("Which colour is the thing in the middle of it?", "It is a deep and saturated red, I think."),
    ("Hm?", "No."),
    ("Say it in many words.", "One two three four five six seven eight nine ten eleven twelve."),
)


def make_uneven_rows(folder: Path, text_only: bool = False) -> Path:
    """Write four conversations of uneven length about images of uneven size, a fifth without an image if wanted."""
    rows: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(TALKS):
        pixels = np.random.default_rng(number).integers(0, 255, (40 + 8 * number, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(_conversation(str(number), f"<image>\n{question}", answer, image=f"{number}.png"))
    if text_only:
        rows.append(_conversation("text", "Do you hear me?", "Yes, I do, very well."))
    (folder / "uneven.json").write_text(json.dumps(rows))
    return folder / "uneven.json"


def _conversation(name: str, question: str, answer: str, **fields: str) -> dict[str, Any]:
    """One row in LLaVA's form."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, **fields}


def batch_of(folder: Path, data: Data, size: int = 3) -> Batch:
    """The first training batch, as the model of ``folder`` gets it."""
    module = MMDataModule(train=str(data["train"]), batch_size=size, num_workers=0, processor=str(folder))
    module.setup("fit")
    return next(iter(module.train_dataloader()))
