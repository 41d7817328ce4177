"""Models with random weights, and batches for them, for the suite that runs on an accelerator.

Data flow: ``Shape`` -> a LLaVA on a device; shape + seed -> ``Batch`` of uneven conversations about one picture each.

Shapes: B rows, L tokens after padding, S supervised positions.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from lightning_mm.data.batch import Batch, TokenRegion
from lightning_mm.data.sample import Sample, Turn

_VOCABULARY, _IMAGE = 32_000, 31_999


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A LLaVA: decoder, tower, and how long the texts are."""

    hidden: int
    layers: int
    heads: int
    groups: int
    inner: int
    tower_hidden: int
    tower_layers: int
    side: int
    patch: int
    text: int

    @property
    def image_tokens(self) -> int:
        return (self.side // self.patch) ** 2

    def model(self) -> Any:
        """On the device that is in force."""
        decoder = LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            intermediate_size=self.inner,
            vocab_size=_VOCABULARY,
        )
        tower = CLIPVisionConfig(
            hidden_size=self.tower_hidden,
            num_hidden_layers=self.tower_layers,
            num_attention_heads=self.tower_hidden // 64,
            intermediate_size=4 * self.tower_hidden,
            image_size=self.side,
            patch_size=self.patch,
        )
        config = LlavaConfig(text_config=decoder, vision_config=tower, image_token_index=_IMAGE)
        return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


NANO = Shape(
    hidden=576,
    layers=30,
    heads=9,
    groups=3,
    inner=1536,
    tower_hidden=384,
    tower_layers=12,
    side=112,
    patch=14,
    text=96,
)
LLAVA_1B = Shape(
    hidden=2048,
    layers=22,
    heads=32,
    groups=4,
    inner=5632,
    tower_hidden=1024,
    tower_layers=24,
    side=336,
    patch=14,
    text=256,
)
MODELS = {"nano": NANO, "LLaVA 1.4 B": LLAVA_1B}
SMALL = {
    "tiny": Shape(
        hidden=64, layers=4, heads=4, groups=2, inner=128, tower_hidden=64, tower_layers=2, side=56, patch=14, text=48
    )
}


def built(shape: Shape, device: torch.device) -> Any:
    """The model there, with the same weights at every call."""
    torch.manual_seed(0)
    with torch.device(device):
        return shape.model()


def batch_of(shape: Shape, rows: int, seed: int) -> Batch:
    """Uneven rows: a picture, and half to all of ``shape.text`` tokens, a third of them the answer."""
    drawn = torch.Generator().manual_seed(seed)
    texts = torch.randint(shape.text // 2, shape.text + 1, (rows,), generator=drawn).tolist()
    length = shape.image_tokens + max(texts)
    ids = torch.zeros(rows, length, dtype=torch.long)
    regions = torch.full((rows, length), int(TokenRegion.PAD), dtype=torch.uint8)
    for row, text in enumerate(texts):
        end, answer = shape.image_tokens + text, text // 3
        ids[row, :end] = torch.randint(3, _IMAGE, (end,), generator=drawn)
        ids[row, 1 : 1 + shape.image_tokens] = _IMAGE
        regions[row, :end] = int(TokenRegion.PROMPT)
        regions[row, 1 : 1 + shape.image_tokens] = int(TokenRegion.IMAGE)
        regions[row, end - answer : end] = int(TokenRegion.ANSWER)
    answers = (regions == TokenRegion.ANSWER).flatten().nonzero()[:, 0]
    inputs = {
        "input_ids": ids,
        "attention_mask": (regions != TokenRegion.PAD).long(),
        "pixel_values": torch.randn(rows, 3, shape.side, shape.side, generator=drawn),
    }
    turns = (Turn("user", "<image>"), Turn("assistant", "x"))
    samples = tuple(Sample(str(row), turns, (Path("drawn.png"),)) for row in range(rows))
    return Batch(inputs, regions, answers - 1, ids.flatten()[answers], samples)


def conversations(folder: Path, count: int) -> Path:
    """A file of questions about pictures of one colour, for training and for probes."""
    colours = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "black": (0, 0, 0)}
    rows = []
    for index in range(count):
        name = list(colours)[index % len(colours)]
        Image.new("RGB", (56, 56), colours[name]).save(folder / f"{index}.png")
        said = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": name}]
        caption = f"a {name} picture"
        rows.append(
            {
                "id": str(index),
                "image": f"{index}.png",
                "caption": caption,
                "objects": [{"name": name, "box": [0, 0, 56, 56]}],
            }
        )
        rows[-1]["conversations"] = said
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
