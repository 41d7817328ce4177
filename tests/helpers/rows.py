"""Conversations of uneven length about pictures of uneven size, one of them without a picture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TALKS = (
    ("What is it?", "A cat."),
    ("Which colour is the thing in the middle of it?", "It is a deep and saturated red, I think."),
    ("Hm?", "No."),
    ("Say it in many words.", "One two three four five six seven eight nine ten eleven twelve."),
)


def uneven(folder: Path, text_only: bool = False) -> Path:
    """Write four of them, a fifth one without a picture if wanted; returns the file."""
    rows: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(TALKS):
        pixels = np.random.default_rng(number).integers(0, 255, (40 + 8 * number, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(talk(str(number), f"<image>\n{question}", answer, image=f"{number}.png"))
    if text_only:
        rows.append(talk("text", "Do you hear me?", "Yes, I do, very well."))
    (folder / "uneven.json").write_text(json.dumps(rows))
    return folder / "uneven.json"


def talk(name: str, question: str, answer: str, **fields: str) -> dict[str, Any]:
    """One row in LLaVA's form."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, **fields}
