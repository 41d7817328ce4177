"""Tiny models that know something: which answer goes with which word of a question, learned in some steps of Adam.

Data flow: folder of a tiny model -> ``taught`` -> a model that answers ``KNOWN`` right -> the tests edit that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lightning_mm.causal.questions.question import Question, QuestionEncoder
from lightning_mm.causal.questions.scoring import ForcedAnswer, answer_logits, force_answer
from lightning_mm.models.block_parts import BlockPart
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout, Region
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.models.processor import load_processor

KNOWN = {"b": "a", "c": "e", "d": "i", "f": "o"}
"""Which answer goes with which constraint: one token each."""

EDITED = 1
"""The layer whose MLP tells the words apart for those above: they alone have learned."""


@dataclass(frozen=True, eq=False)
class Taught:
    """A tiny model that answers ``KNOWN`` right."""

    model: Any
    layout: ModelLayout
    encoder: QuestionEncoder
    folder: Path
    picture: Path

    @property
    def mm(self) -> MultimodalModel:
        """The handle of the model."""
        return MultimodalModel(self.model, self.layout)

    def question(self, word: str, text: str = "Which is {} thing?") -> Question:
        wording = text.format(word)
        start = wording.index(word)
        return Question(word, wording, (self.picture,), ((start, start + len(word)),), KNOWN[word], group=word)

    def forced(self, word: str, answer: str, text: str | None = None) -> ForcedAnswer:
        found = force_answer(self.encoder, self.question(word), answer, text)
        assert isinstance(found, ForcedAnswer), found
        return found


def taught(folder: Path, work: Path) -> Taught:
    """Load a tiny model and teach it.

    Args:
        folder: Of the tiny model.
        work: An empty folder for a picture.
    """
    picture = work / "picture.png"
    work.mkdir(parents=True, exist_ok=True)
    Image.radial_gradient("L").convert("RGB").resize((48, 40)).save(picture)
    torch.manual_seed(0)
    model: Any = load_model(Backbone(path=str(folder)))
    made = Taught(model, ModelLayout.of(model), QuestionEncoder(load_processor(str(folder))), folder, picture)
    lessons = [made.forced(word, answer) for word, answer in KNOWN.items()]
    frozen = (Region.VISION, Region.CONNECTOR)
    weights = [
        p
        for n, p in model.named_parameters()
        if (place := made.layout.locations[n]).region not in frozen and (place.layer is None or place.layer > EDITED)
    ]
    model.requires_grad_(False)
    for name, place in made.layout.locations.items():
        if place.layer == EDITED and place.part is BlockPart.MLP:
            model.get_parameter(name).mul_(5)  # it says so much at the start that the layers above go by it
    for weight in weights:
        weight.requires_grad_(True)
    adam = torch.optim.Adam(weights, 1e-2)
    for _ in range(120):
        nll = sum(F.cross_entropy(answer_logits(made.mm, each)[:-1], each.ids) for each in lessons)
        if float(nll.detach()) < 0.05:
            break
        adam.zero_grad()
        nll.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
    assert float(nll.detach()) < 0.4, "the tiny model has not learned"
    model.requires_grad_(False)
    model.zero_grad()
    return made


@pytest.fixture(scope="session")
def known(family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Taught]:
    """The taught model of a family; tests leave it as it is."""
    return cache(lambda name: taught(family(name), tmp_path_factory.mktemp("taught") / name))
