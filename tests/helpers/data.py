"""Tiny data with images: rows of conversations and of probes as files, and batches of them.

Data flow: random draws with a seed -> images and JSON in a temporary folder -> (``MMDataModule``) -> ``Batch``.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule

Family = Callable[[str], Path]
"""The fixture ``family``: the folder of a tiny model, by the name of its family."""
Data = dict[str, Path]
"""The fixture ``data``: the data file of each split."""
FAMILIES = ("llava", "qwen2_5_vl", "smolvlm", "internvl", "gemma3")
"""The families that every policy is tried on."""

COLOURS = ("red", "green", "blue", "white")
SIZES = {"tiny": 8, "small": 12, "big": 18}
GROUNDS = ("black", "grey", "brown", "purple")
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


def make_rows(folder: Path, count: int, *, seed: int = 0, text_only: bool = False) -> list[dict[str, Any]]:
    """Conversations of uneven length about pictures of one colour, written to ``folder``."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        colour = generator.choice(["red", "green", "blue", "white"])
        turns = []
        for turn in range(generator.randint(1, 3)):
            mark = "<image>\n" if turn == 0 and not text_only else ""
            words = " ".join(generator.choice(["a", "big", "small", "old"]) for _ in range(generator.randint(0, 6)))
            turns += [
                {"from": "human", "value": f"{mark}What colour is this {words} thing?"},
                {"from": "gpt", "value": f"It is {colour}{' indeed' * generator.randint(0, 4)}.", "type": colour},
            ]
        row: dict[str, Any] = {"id": f"row-{index}", "conversations": turns}
        if not text_only:
            name = f"picture-{seed}-{index}.png"
            Image.new("RGB", (40 + index % 5, 36), colour).save(folder / name)
            row["image"] = name
        rows.append(row)
    return rows


def make_probe_rows(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Pictures of one or two squares, no two alike, with what is true and false of them, in the documented format."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    things = [(size, colour) for size in SIZES for colour in COLOURS]
    ones = [([one], ground) for one in things for ground in GROUNDS]
    twos = [([one, two], ground) for one in things for two in things for ground in GROUNDS if one[1] != two[1]]
    generator.shuffle(ones)
    generator.shuffle(twos)
    scenes = [ones[index // 3] if index % 3 == 0 else twos[index] for index in range(count)]
    rows = [_probe_row(folder / f"probe-{seed}-{i}.png", *scene, generator) for i, scene in enumerate(scenes)]
    file = folder / f"probes-{seed}.json"
    file.write_text(json.dumps(rows))
    return file


def _probe_row(file: Path, squares: list[tuple[str, str]], ground: str, generator: random.Random) -> dict[str, Any]:
    picture = Image.new("RGB", (40, 40), ground)
    objects = []
    for (size, colour), left in zip(squares, (0, 20), strict=False):
        box = (left, 10, left + SIZES[size], 10 + SIZES[size])
        picture.paste(colour, box)
        objects.append({"name": colour, "box": box})
    picture.save(file)
    wrong = generator.choice([colour for colour in COLOURS if colour not in {c for _, c in squares}])

    def told(named: list[tuple[str, str]]) -> str:
        return " and ".join(f"a {size} {colour} square" for size, colour in named) + f" on {ground}"

    return {
        "id": file.stem,
        "image": file.name,
        "caption": told(squares),
        "false_captions": [told([(squares[0][0], wrong), *squares[1:]])],
        "objects": objects,
    }


def batch_of(folder: Path, data: Data, size: int = 3) -> Batch:
    """The first training batch, as the model of ``folder`` gets it."""
    module = MMDataModule(train=str(data["train"]), batch_size=size, num_workers=0, processor=str(folder))
    module.setup("fit")
    return next(iter(module.train_dataloader()))
