"""Rows of which several are about one picture: written to a folder, and opened with ``data.share_images``."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_mm import MMDataModule


def write_rows(folder: Path, per_picture: list[int], *, mark_last: bool = False) -> Path:
    """One question a row; the n-th picture has as many rows as the n-th number says, not side by side."""
    rows: list[dict[str, Any]] = []
    for turn in range(max(per_picture)):
        for picture, count in enumerate(per_picture):
            if turn < count:
                question = "What colour is " + "a big " * turn + "thing?"
                text = f"{question}\n<image>" if mark_last else f"<image>\n{question}"
                turns = [{"from": "human", "value": text}, {"from": "gpt", "value": f"It is {'red ' * (turn + 1)}."}]
                rows.append({"id": f"{picture}-{turn}", "image": f"{picture}.png", "conversations": turns})
    for picture in range(len(per_picture)):
        Image.new("RGB", (40 + picture, 36), (20 * picture, 200, 0)).save(folder / f"{picture}.png")
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def module(file: Path, family: Path, **options: Any) -> MMDataModule:
    data = MMDataModule(train=str(file), processor=str(family), num_workers=0, share_images=True, **options)
    data.setup("fit")
    return data
