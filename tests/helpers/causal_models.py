"""A tiny model of any family with a question about a picture, ready to be intervened on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AttentionMaskInterface

from lightning_mm.causal.questions.question import EncodedQuestion, Question, QuestionEncoder
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.models.processor import Processing, load_processing

FAMILIES = (
    "llava",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "smolvlm",
    "internvl",
    "gemma3",
    "mllama",
)
TEXT = "What colour is the small old thing?"
SPAN = (19, 28)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and how to ask it."""

    model: Any
    layout: ModelLayout
    processing: Processing
    encoder: QuestionEncoder
    folder: Path

    @property
    def mm(self) -> MultimodalModel:
        """The handle of the model."""
        return MultimodalModel(self.model, self.layout, self.processing)

    def encode(self, text: str = TEXT, span: tuple[int, int] = SPAN, seed: int = 0, **fields: Any) -> EncodedQuestion:
        """A question about a picture of noise."""
        question = Question(f"q{seed}", text, (noise(self.folder / f"{seed}.png", seed),), (span,), **fields)
        encoded = self.encoder.encode(question)
        assert isinstance(encoded, EncodedQuestion), encoded
        return encoded


def noise(file: Path, seed: int) -> Path:
    """A picture that is like no other."""
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def subject(family: Callable[[str], Path], name: str, folder: Path) -> Subject:
    """The tiny model of a family, in eval mode."""
    path = str(family(name))
    processing = load_processing(path)
    model: Any = load_model(Backbone(path=path))
    return Subject(
        model.eval().requires_grad_(False), ModelLayout.of(model), processing, QuestionEncoder(processing), folder
    )


def see_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every token see every other wherever attention is looked into, as in models whose prompt is a prefix."""
    masks: Any = AttentionMaskInterface._global_mapping
    causal = masks["eager"]
    monkeypatch.setitem(masks, "eager", lambda *given, **named: torch.zeros_like(causal(*given, **named)))
