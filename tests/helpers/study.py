"""A study of seconds on a tiny model: questions of two types about pictures of one color, facts, probes, three arms."""

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from tests.helpers.data import make_probe_rows, make_rows

COLORS = ("red", "green", "blue")


def make_questions(folder: Path, pictures: int) -> Path:
    """Two questions about each picture, of which no two have the same size."""
    generator = random.Random(3)
    rows = []
    for number in range(pictures):
        color = generator.choice(COLORS)
        Image.new("RGB", (40, 36 + number), color).save(folder / f"asked-{number}.png")
        for text, answer, kind in (
            ("What colour is it?", color, "colour"),
            ("Is it red?", "yes" if color == "red" else "no", "yes_no"),
        ):
            rows.append(_row(f"{number}-{kind}", f"<image>\n{text}", answer, kind, image=f"asked-{number}.png"))
    file = folder / "test.json"
    file.write_text(json.dumps(rows))
    return file


def make_facts(folder: Path, count: int) -> Path:
    """Questions without pictures."""
    file = folder / "facts.json"
    file.write_text(json.dumps([_row(str(n), f"What is {n}?", "a number", "fact") for n in range(count)]))
    return file


def make_study(folder: Path, model: Path) -> dict[str, Any]:
    """Options of a study, with its files under a folder."""
    folder.mkdir(exist_ok=True)
    train = folder / "train.json"
    train.write_text(json.dumps(make_rows(folder, 24)))
    probes = make_probe_rows(folder / "probes", 24)
    options = {
        "trainer.accelerator": "cpu",
        "data.train": str(train),
        "data.num_workers": 0,
        "data.batch_size": 2,
        "data.max_length": 256,
    }
    return {
        "model": str(model),
        "options": options,
        "stage1": {"steps": 3},
        "stage2": {"steps": 6},
        "lr": 0.01,
        "connector_lr": 0.01,
        "arms": {
            "connector": {"tuning": "ConnectorOnly"},
            "middle": {"tuning": "IntermediateOnly", "options": {"layers": "1"}},
            "full": {"tuning": "Full", "lr": 0.02},
        },
        "seeds": [0, 1],
        "tests": {"test": str(make_questions(folder, 8))},
        "facts": str(make_facts(folder, 4)),
        "text_chunks": 4,
        "text_tokens": 16,
        "layers": {"probes": str(probes), "images": 24, "measures": ["overlap", "gap"], "arms": ["middle"]},
        "save_every": 2,
    }


def _row(name: str, question: str, answer: str, kind: str, **more: str) -> dict[str, Any]:
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer, "type": kind}]
    return {"id": name, "conversations": talk, **more}
