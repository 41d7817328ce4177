"""Tiny data with pictures, for tests and for trying things out offline: conversations, and probe rows.

Data flow: random draws with a seed -> pictures and JSON in a folder -> ``MMDataModule`` or ``inspect --probes``.
"""

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue", "white")
SIZES = {"tiny": 8, "small": 12, "big": 18}
GROUNDS = ("black", "grey", "brown", "purple")


def build_tiny_data(folder: str | Path, *, rows: int = 16, probes: int = 48) -> Path:
    """Write ``train.json`` and ``val.json`` (conversations about pictures of one colour) and ``probes.json``.

    Args:
        folder: Folder to make or to add to.
        rows: Number of training conversations; half as many for validation.
        probes: Number of probe pictures: one or two coloured squares, with captions, false captions and boxes.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", rows, 0), ("val", max(1, rows // 2), 1)):
        (folder / f"{name}.json").write_text(json.dumps(make_rows(folder, count, seed=seed), indent=1))
    make_probe_rows(folder, probes).rename(folder / "probes.json")
    return folder


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
