"""Rows ``transplant`` of ``layers.csv``: answers of hybrids of two models, made and judged by transformers alone.

The tuned model has learned some conversations by heart, with and without a picture; the base knows none.

Tolerances: shares of conversations, counted: equal.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_mm as mm
from lightning_mm.causal.effects.layer_transplant import TransplantConfig
from lightning_mm.testing.tiny import build_tiny
from tests.helpers.plain_answers import Talk, batch_loss, nll, write_talks
from tests.helpers.plain_states import PlainModel

FAMILIES = ("llava", "qwen2_vl")
LAYERS, TALKS = 4, 8


def learned(folder: Path, talks: Sequence[Talk]) -> PlainModel:
    """The model, its blocks, norm and head trained until it answers all conversations."""
    torch.manual_seed(0)
    plain = PlainModel(folder)
    plain.model.requires_grad_(False)
    parts = [*plain.blocks, plain.model.get_decoder().norm, plain.model.get_output_embeddings()]
    weights = [p.requires_grad_(True) for part in parts for p in part.parameters()]
    adam = torch.optim.Adam(weights, 1e-2)
    for _ in range(60):
        loss = batch_loss(plain, talks)
        if float(loss.detach()) < 0.1:
            break
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
    assert all(is_right(plain, talk) for talk in talks), "the tiny model has not learned"
    plain.model.requires_grad_(False)
    return plain


@torch.no_grad()
def is_right(plain: PlainModel, talk: Talk) -> bool:
    """Whether every token of the answer is the most likely one."""
    return bool(nll(plain, talk)[2].all())


@contextmanager
def hybrid(base: PlainModel, tuned: PlainModel, layers: Sequence[int]) -> Any:
    """The base with blocks of the tuned model; the last one brings norm and head."""
    own, decoder = list(base.blocks), base.model.get_decoder()
    norm, head = decoder.norm, base.model.get_output_embeddings()
    for layer in layers:
        base.blocks[layer] = tuned.blocks[layer]
    if len(own) - 1 in layers:
        decoder.norm, base.model.lm_head = tuned.model.get_decoder().norm, tuned.model.get_output_embeddings()
    yield
    for layer in layers:
        base.blocks[layer] = own[layer]
    decoder.norm, base.model.lm_head = norm, head


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    def made(family: str) -> Any:
        folder = tmp_path_factory.mktemp(family)
        base = build_tiny(family, folder / "base", layers=LAYERS)
        talks = write_talks(folder / "talks.json", TALKS)
        tuned = learned(base, talks)
        build_tiny(family, folder / "tuned", layers=LAYERS)
        tuned.model.save_pretrained(folder / "tuned")
        return folder, talks, tuned

    return cache(made)


@pytest.mark.parametrize("family", FAMILIES)
def test_hybrids(family: str, models: Callable[[str], Any]) -> None:
    folder, talks, tuned = models(family)
    asked = [{"id": "q", "question": "What is it?", "constraint": "it", "image": talks[0].picture}]
    config = TransplantConfig(width=2, step=1)
    study = mm.StudyConfig(parts=("flow",), flow=("image->last",))
    found = mm.trace(
        folder / "base", asked, against=folder / "tuned", data=folder / "talks.json", study=study, transplant=config,
        batches=3, batch_size=3,
    )  # fmt: skip
    base = PlainModel(folder / "base")
    windows = {
        "cumulative": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]],
        "sliding": [[0], [0, 1], [1, 2], [2, 3]],
    }
    seen = set()
    for mode, layers in windows.items():
        for modality in ("picture", "text"):
            own = [talk for talk in talks if bool(talk.picture) == (modality == "picture")]
            profile = found.profile("transplant", f"{mode}/{modality}")
            assert sorted(profile) == [0, 1, 2, 3]
            for layer, chosen in enumerate(layers):
                with hybrid(base, tuned, chosen):
                    right = sum(is_right(base, talk) for talk in own) / len(own)
                row = profile[layer]
                assert (row.value, row.null, row.n) == (pytest.approx(right), 0.0, len(own)), (mode, modality, layer)
                seen.add(right)
    assert {0.0, 1.0} < seen or len(seen) > 1, "hybrids that know all or nothing alike show nothing"
