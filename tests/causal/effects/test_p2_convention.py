"""``--convention p2`` is the protocol of the code released with Basu et al. 2024: its loop over three rows."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mm.causal.effects.activation_patching import causal_trace
from lightning_mm.causal.interventions.corruption import CorruptedQuestion, corrupt_question, first_token
from lightning_mm.causal.questions.question import P2_PROMPT, EncodedQuestion, Question, QuestionEncoder
from lightning_mm.causal.study import StudyConfig
from tests.helpers.causal_models import Subject, noise, subject

TEXT = "Is the cat red? What colour is the cat?"
SPANS = ((7, 10), (35, 38))


@pytest.fixture
def llava(family: Callable[[str], Path], tmp_path: Path) -> Subject:
    return subject(family, "llava", tmp_path)


def ask(one: Subject) -> EncodedQuestion:
    encoder = QuestionEncoder(one.processing, P2_PROMPT)
    encoded = encoder.encode(Question("q", TEXT, (noise(one.folder / "q.png", 0),), SPANS))
    assert isinstance(encoded, EncodedQuestion), encoded
    return encoded


@torch.no_grad()
def three_rows(one: Subject, encoded: EncodedQuestion, word: int, target: int, layers: Sequence[int], kind: str,
               token: int) -> tuple[float, float, float]:  # fmt: skip
    """Clean, corrupt and restored probability: row 2 is corrupt, with the module outputs of row 0 at one token."""
    inputs = {k: v.repeat(3, *[1] * (v.ndim - 1)) for k, v in encoded.inputs.items()}
    for position in encoded.spans[0].tolist():
        inputs["input_ids"][1:, position] = word

    def restore(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[2, token] = hidden[0, token]
        return output

    handles = []
    for layer in layers:
        block = one.model.get_submodule(one.layout.layers[layer])
        module = block.mlp if kind == "mlp" else block.self_attn
        handles.append(module.register_forward_hook(restore))
    try:
        probs: Tensor = one.model(**inputs, use_cache=False).logits[:, -1].double().softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    clean, corrupt, restored = probs[:, target].tolist()
    return clean, corrupt, restored


@pytest.mark.parametrize(("width", "window"), [(1, {0: [0], 2: [2]}), (2, {0: [0, 1, 2], 2: [0, 1, 2, 3]})])
def test_is_the_released_loop(width: int, window: dict[int, list[int]], llava: Subject) -> None:
    encoded, study = ask(llava), StudyConfig.p2(width)
    corrupt = corrupt_question(
        encoded, study.corruption, (), llava.processing, llava.mm, places=study.places, word="Paris"
    )
    assert isinstance(corrupt, CorruptedQuestion), corrupt
    found = causal_trace(llava.mm, encoded, corrupt, study.trace)
    word = first_token(llava.processing, "Paris")
    compared = 0
    for s, kind in enumerate(found.sites):
        for layer, layers in window.items():
            for u, unit in enumerate(found.units):
                (token,) = unit.tolist()
                clean, fallen, restored = three_rows(llava, encoded, word, found.target, layers, kind, token)
                # Sums of the same float32 products in another order.
                assert found.p_clean == pytest.approx(clean, abs=1e-6)
                assert found.p_corrupt == pytest.approx(fallen, abs=1e-6)
                assert float(found.restored[s, layer, u]) == pytest.approx(restored, abs=1e-6)
                compared += 1
    assert compared > 40
    assert found.effect.abs().max() > 1e-6, "what brings nothing back shows nothing"


def test_only_the_first_place_is_overwritten(llava: Subject) -> None:
    encoded = ask(llava)
    for kind in ("token", "gaussian"):
        first, both = (
            corrupt_question(encoded, kind, (), llava.processing, llava.mm, places=places)  # type: ignore[arg-type]
            for places in ("first", "all")
        )
        assert isinstance(first, CorruptedQuestion)
        assert isinstance(both, CorruptedQuestion)
        assert first.positions.tolist() == encoded.spans[0].tolist()
        assert both.positions.tolist() == encoded.constraint.tolist()
    lender = replace(encoded, question=replace(encoded.question, id="other"))
    swapped = lender.inputs["input_ids"].clone()
    swapped[0, encoded.spans[0]] += 1
    lender = replace(lender, inputs={**lender.inputs, "input_ids": swapped})
    made = corrupt_question(encoded, "symmetric", (lender,), llava.processing, llava.mm, places="first")
    assert isinstance(made, CorruptedQuestion)
    assert made.positions.tolist() == encoded.spans[0].tolist()


def test_the_prompt_is_the_released_one(llava: Subject) -> None:
    said = "".join(ask(llava).tokens).replace("\u2581", " ")
    assert "the cat?? Answer in a few words." in said or "thecat??Answerinafewwords." in said.replace(" ", "")
