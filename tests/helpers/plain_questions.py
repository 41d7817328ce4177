"""Questions about one picture, two and none, with one constraint or two, and some that are answered wrong.

The model's weights are scaled up, so that what a part of it does shows in the answer.

Data flow: tiny model and ``ASKED`` -> ``Traced``: the folder and the file that ``trace`` is given, and the oracle's
questions and runs; ``check`` compares a profile of layers with the oracle's.

Shapes: V vocabulary size.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lightning_mm as mm
from lightning_mm.testing.tiny import build_tiny
from tests.helpers.plain_causal import PlainQuestion, PlainRuns
from tests.helpers.plain_states import PlainModel

FAMILIES = ("llava", "qwen2_vl")
LAYERS, IMAGE_UNITS = 4, 3
SITES = ("mlp", "attention", "residual")
EDGES = ("image->constraint", "constraint->last", "image->last", "question->last", "image->question")
CLASSES = ("image_early", "image_late", "constraint", "question", "template", "last")
CLOSE: dict[str, float] = {"abs": 2e-4, "rel": 1e-3}
LAST_ONLY = 2
"""Layers of a window by the convention of ROME: the layer and the one below."""

ASKED: tuple[dict[str, Any], ...] = (
    {"id": "one", "image": ["0.png"], "question": "Which colour has the old cat?", "constraint": ["the old cat"]},
    {"id": "two", "image": ["1.png", "2.png"], "question": "Are a dog and a bird on both?", "constraint": ["a bird"]},
    {"id": "none", "image": [], "question": "What is the capital of France?", "constraint": ["France"]},
    {
        "id": "both",
        "image": ["3.png"],
        "question": "Is a boat under a bridge here?",
        "constraint": ["a boat", "bridge"],
    },
    {"id": "same", "image": ["0.png"], "question": "How big is the thing?", "constraint": ["the thing"]},
    {"id": "other", "image": ["4.png"], "question": "What does that man hold in his hand?", "constraint": ["that man"]},
)
WRONG: tuple[dict[str, Any], ...] = tuple(
    {**ASKED[number], "id": f"wrong {number}", "answer": answer} for number, answer in ((0, "zebra"), (3, "A kiwi"))
)


def loud(family: str, folder: Path) -> Path:
    """A tiny model whose blocks and head say more than at their start."""
    plain = PlainModel(build_tiny(family, folder))
    with torch.no_grad():
        for block in plain.blocks:
            for weight in block.parameters():
                if weight.ndim == 2:
                    weight *= 6
        plain.model.get_output_embeddings().weight.mul_(40)
    plain.model.save_pretrained(folder)
    return folder


class Traced:
    """What ``trace`` found in one family, the oracle's questions and its model."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = loud(family, folder / "model")
        for number in range(5):
            pixels = np.random.default_rng(number).integers(0, 255, (44, 44 + 12 * (number == 3), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        self.file = folder / "questions.json"
        rows = [{k: v for k, v in row.items() if k != "image"} | {"images": row["image"]} for row in (*ASKED, *WRONG)]
        self.file.write_text(json.dumps(rows))
        plain = PlainModel(self.folder)
        self.runs = PlainRuns(plain)
        self.asked = [
            PlainQuestion(plain, row["id"], row["question"], [str(folder / f) for f in row["image"]], row["constraint"])
            for row in ASKED
        ]

    @cache  # noqa: B019  (a few per test module)
    def clean(self, number: int) -> torch.Tensor:
        """(V,) logits of a question; the model's own answer is followed."""
        return self.runs.logits(self.asked[number].inputs)[0]

    def target(self, number: int) -> int:
        return int(self.clean(number).argmax())

    def trace(self, **options: Any) -> Any:
        return mm.trace(self.folder, self.file, study=mm.StudyConfig(**options))

    def mean(self, values: Sequence[Sequence[float]]) -> list[float]:
        """Means over questions by layer, without what is undefined."""
        return [float(x) for x in np.nanmean(np.array(values, dtype=float), 0)]


def check(found: Any, measure: str, site: str, expected: Sequence[float], n: int, **close: float) -> None:
    profile = found.profile(measure, site)
    assert sorted(profile) == list(range(len(expected))), f"{measure} at {site}"
    assert [row.value for row in profile.values()] == pytest.approx(list(expected), **(close or CLOSE)), (measure, site)
    assert {row.n for row in profile.values()} == {n}, (measure, site)


def compared(one: Traced, number: int, after: torch.Tensor) -> list[float]:
    """Relative change of the answer's probability, whether it stays, KL(before || after), change of its logit."""
    before, target = one.clean(number), one.target(number)
    p, q = before.softmax(-1), after.softmax(-1)
    divergence = (p * (before.log_softmax(-1) - after.log_softmax(-1))).sum()
    kept = float(after.argmax() == target)
    return [float(q[target] / p[target] - 1), kept, float(divergence), float(after[target] - before[target])]
