"""easy-VQA in its official split: published questions about colored shapes, as a yardstick from outside.

Source: V. Zhou, easy-VQA (2019), the PyPI package ``easy-vqa`` 1.0, MIT. 4,000 and 1,000 pictures of 64 pixels with
38,575 and 9,673 questions: yes or no, shape, color.

Data flow: wheel in the cache of ``packages`` -> pictures copied, questions -> rows -> ``build``.
"""

import json
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_mm.data.sample import IMAGE_MARK
from lightning_mm.nano.data.questions import format_answer
from lightning_mm.nano.data.rows import Row

SPLITS = ("train", "test")
_SHAPES = ("circle", "rectangle", "triangle")


def copied_rows(wheel: Path, folder: Path) -> dict[str, list[Row]]:
    """Copy the pictures, and give the rows of each split, one per question, those of a picture together.

    Args:
        wheel: The package.
        folder: Folder that ``images`` is made in.
    """
    rows: dict[str, list[Row]] = {}
    with zipfile.ZipFile(wheel) as files:
        for split in SPLITS:
            source, images = f"easy_vqa/data/{split}", folder / "images" / split
            images.mkdir(parents=True)
            for name in files.namelist():
                if name.startswith(f"{source}/images/") and name.endswith(".png"):
                    (images / PurePosixPath(name).name).write_bytes(files.read(name))
            asked = json.loads(files.read(f"{source}/questions.json"))
            asked.sort(key=lambda each: each[2])
            rows[split] = [_row(split, number, *each) for number, each in enumerate(asked)]
    return rows


def _row(split: str, number: int, question: str, answer: str, image: int) -> Row:
    kind = "yes_no" if answer in ("yes", "no") else "shape" if answer in _SHAPES else "colour"
    turns: list[dict[str, Any]] = [
        {"from": "human", "value": f"{IMAGE_MARK}\n{question[0].upper()}{question[1:]}"},
        {"from": "gpt", "value": format_answer(answer), "type": kind},
    ]
    name = f"{split}-{number:05d}"
    return {
        "id": f"easy-vqa-{name}",
        "image": f"images/{split}/{image}.png",
        "conversations": turns,
        "question_type": kind,
    }
