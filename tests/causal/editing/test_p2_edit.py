"""MultEdit under ``EditConfig.p2`` is the algorithm of the code released with Basu et al. 2024 (arXiv:2406.04236).

Data flow: one question whose constraint stands in it twice -> a loop written here after that code: whole forward
passes, Adam, a clamp after each step, the inverse of an F x F matrix -> compared with ``multedit``.

Shapes: D hidden size, F inner size of the MLP.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mm.causal.editing.multedit import P2_LAYER, EditConfig, ValueOptimizer, multedit
from lightning_mm.causal.questions.question import P2_PROMPT, EncodedQuestion, Question, QuestionEncoder
from lightning_mm.causal.questions.scoring import ForcedAnswer, force_answer
from tests.helpers.causal_models import Subject, noise, subject

TEXT = "Is the cat red? What colour is the cat?"
SPANS = ((7, 10), (35, 38))
RIDGE, DECAY, LR = 0.01, 0.001, 0.1


@pytest.fixture
def llava(family: Callable[[str], Path], tmp_path: Path) -> Subject:
    return subject(family, "llava", tmp_path)


def asked(one: Subject) -> tuple[EncodedQuestion, ForcedAnswer]:
    encoder = QuestionEncoder(one.processing, P2_PROMPT)
    question = Question("q", TEXT, (noise(one.folder / "q.png", 0),), SPANS)
    encoded, forced = encoder.encode(question), force_answer(encoder, question, "red")
    assert isinstance(encoded, EncodedQuestion), encoded
    assert isinstance(forced, ForcedAnswer), forced
    return encoded, forced


def released_loop(one: Subject, encoded: EncodedQuestion, word: int, place: int, steps: int, clamp: float) -> Tensor:
    """(D, F) edited weight: ten steps of Adam on what the module adds at one token, and the closed form.

    The loss is that of the new answer's first token after the prompt alone. Float32 as the model is, float64 inverse.
    """
    module = one.model.get_submodule(str(one.layout.blocks[P2_LAYER].down_proj))
    token = int(encoded.spans[place][-1])
    seen: dict[str, Tensor] = {}

    def change(_: Any, args: Any, output_1LD: Tensor) -> Tensor:
        seen.setdefault("key", args[0][0, token].detach().clone())
        seen.setdefault("init", output_1LD[0, token].detach().clone())
        moved = output_1LD.clone()
        moved[0, token] += delta_D
        return moved

    delta_D = torch.zeros(module.weight.shape[0], requires_grad=True)
    adam = torch.optim.Adam([delta_D], lr=LR)
    handle = module.register_forward_hook(change)
    try:
        for _ in range(steps):
            adam.zero_grad()
            logits = one.model(**encoded.inputs, use_cache=False).logits[0, -1]
            loss = -logits.log_softmax(-1)[word] + DECAY * delta_D.norm() / seen["init"].norm() ** 2
            loss.backward()
            adam.step()
            largest = clamp * seen["init"].norm()
            if delta_D.norm() > largest:
                with torch.no_grad():
                    delta_D[...] = delta_D * largest / delta_D.norm()
    finally:
        handle.remove()
    key_F, value_D = seen["key"].double(), seen["init"].double() + delta_D.detach().double()
    large_FF = torch.outer(key_F, key_F) + RIDGE * torch.eye(len(key_F), dtype=torch.float64)
    weight_DF = module.weight.detach().double()
    return (large_FF.inverse() @ (torch.outer(key_F, value_D) + RIDGE * weight_DF.T)).T


@pytest.mark.parametrize("config", [EditConfig.p2(), replace(EditConfig.p2(), clamp=4.0)], ids=["released", "clamp 4"])
def test_is_the_released_algorithm(config: EditConfig, llava: Subject) -> None:
    encoded, forced = asked(llava)
    expected_DF = released_loop(llava, encoded, int(forced.ids[0]), 0, 10, config.limit)
    edit = multedit([ValueOptimizer(llava.mm, forced)], P2_LAYER, config)
    weight_DF: Tensor = llava.model.get_parameter(f"{edit.module}.weight").detach().double()
    wanted_DF = expected_DF - weight_DF
    # Float32 products in another order: 1e-3 of the change. The value is the output plus the change, in float32: 5e-7
    # of the output is lost, which the released clamp makes 5e-7 / 1e-4 of the change.
    share = 1e-3 + 5e-7 / config.limit
    torch.testing.assert_close(edit.change().double(), wanted_DF, atol=share * float(wanted_DF.abs().max()), rtol=0)
    elsewhere_DF = released_loop(llava, encoded, int(forced.ids[0]), 1, 10, config.limit) - weight_DF
    assert (elsewhere_DF - wanted_DF).abs().max() > 0.1 * wanted_DF.abs().max(), "the place matters"


def test_the_key_is_at_the_first_place(llava: Subject) -> None:
    """By default it is at the last, which has read the others; both are of one cached run."""
    encoded, forced = asked(llava)
    made = ValueOptimizer(llava.mm, forced)
    for config, place in ((EditConfig.p2(), 0), (replace(EditConfig.p2(), place="last"), 1)):
        key_F = made.association(P2_LAYER, config).key
        seen: list[Tensor] = []
        module = llava.model.get_submodule(str(llava.layout.blocks[P2_LAYER].down_proj))
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
        with torch.no_grad():
            llava.model(**encoded.inputs)
        handle.remove()
        torch.testing.assert_close(key_F, seen[0][int(encoded.spans[place][-1])], atol=1e-6, rtol=1e-5)
    assert EditConfig().place == "last"
