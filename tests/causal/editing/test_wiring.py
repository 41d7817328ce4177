"""MultEdit and what is measured of it, recomputed by plain hooks: key, value, change of the weight, answers after it.

Tolerances: a few steps of Adam on float32 runs, whole against recomputed in part: 2e-3 of the change's norm; logarithms
of probabilities under the changed weight: 5e-3.

Shapes: D hidden size, F inner size of the MLP, T tokens of the answer, V vocabulary size.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import lightning_mm as mm
from tests.helpers.plain_causal import PlainQuestion
from tests.helpers.plain_questions import FAMILIES, Traced

LAYER, STEPS, RATE, DECAY, RIDGE = 1, 4, 0.1, 0.001, 0.01
EDITS = ((0, "red"), (3, "no it is"))
"""Which question gets which new answer."""
OTHER_WORDS = "And which colour is on the old cat?"


def written(family: str, answer: str) -> str:
    """The answer behind the prompt: Vicuna's template puts a blank before it."""
    return f" {answer}" if family == "llava" else answer


def forced(asked: PlainQuestion, family: str, answer: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, int]:
    """Inputs with the answer, its (T,) tokens, and the length of the prompt."""
    whole = replace(asked, begun=written(family, answer))
    return whole.inputs, whole.inputs["input_ids"][0, asked.length :], asked.length


def log_probs(asked: PlainQuestion, family: str, answer: str) -> torch.Tensor:
    """(T, V) at the positions that predict the answer's tokens."""
    inputs, ids, prompt = forced(asked, family, answer)
    logits = asked.plain.model(**inputs, use_cache=False).logits[0, prompt - 1 : prompt - 1 + len(ids)]
    return logits.log_softmax(-1)


def association(asked: PlainQuestion, family: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Key (F,), what enters the down projection at the constraint's last token, and the found change of its output."""
    module, at = asked.plain.blocks[LAYER].mlp.down_proj, asked.parts["constraint"][-1]
    kept: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda _, args, output: kept.extend([args[0][0, at], output[0, at]]))
    ids = forced(asked, family, answer)[1]
    with torch.no_grad():
        log_probs(asked, family, answer)
    hook.remove()
    key, value = kept
    delta = torch.zeros_like(value, requires_grad=True)
    adam = torch.optim.Adam([delta], RATE)

    def shifted(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        here = torch.zeros(output.shape[1]).index_fill(0, torch.tensor(at), 1.0)
        return output + here[:, None] * delta

    hook = module.register_forward_hook(shifted)
    for _ in range(STEPS):
        told = log_probs(asked, family, answer)
        loss = -told[torch.arange(len(ids)), ids].sum() + DECAY * delta.norm() / value.norm().square()
        (delta.grad,) = torch.autograd.grad(loss, [delta])
        adam.step()
    hook.remove()
    return key.detach(), delta.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_and_its_scores(family: str, traced: Callable[[str], Traced]) -> None:
    one = traced(family)
    rows = []
    for number, answer in EDITS:
        asked, near = one.asked[number], one.asked[4]
        row = {"id": asked.id, "question": asked.text, "image": asked.pictures[0], "constraint": [*asked.constraints]}
        row |= {"new_answer": answer, "neighbours": [{"question": near.text, "image": near.pictures[0]}]}
        rows.append(row | ({"paraphrases": [OTHER_WORDS]} if number == 0 else {}))
    config = mm.EditConfig(steps=STEPS, lr=RATE, decay=DECAY, clamp="none", ridge=RIDGE, until=0.0)
    made = mm.edit(one.folder, rows, layer=LAYER, config=config, apply="each", control=False)
    weight = one.asked[0].plain.blocks[LAYER].mlp.down_proj.weight
    one.asked[0].plain.model.requires_grad_(False)
    for index, (number, answer) in enumerate(EDITS):
        asked, other = one.asked[number], one.asked[EDITS[1 - index][0]]
        key, delta = association(asked, family, answer)
        change = torch.outer(delta, key) / (key @ key + RIDGE)
        assert float((made.edits[index].change() - change).norm() / change.norm()) < 2e-3
        questions = {"edited": asked, "neighbour": one.asked[4], "unrelated": other}
        questions |= {"paraphrase": replace(asked, text=OTHER_WORDS)} if number == 0 else {}
        before = {kind: one.runs.logits(each.inputs)[0].log_softmax(-1) for kind, each in questions.items()}
        own = weight.detach().clone()
        weight += change
        scores = {score.kind: score for score in made.outcomes[0].scores if score.edit == asked.id}
        assert scores.keys() == questions.keys()
        for kind, each in questions.items():
            after = one.runs.logits(each.inputs)[0].log_softmax(-1)
            divergence = float((before[kind].exp() * (before[kind] - after)).sum())
            assert scores[kind].kl == pytest.approx(divergence, abs=5e-3, rel=5e-3), kind
            if kind in ("edited", "paraphrase"):
                ids, told = forced(each, family, answer)[1], log_probs(each, family, answer)
                likely = float(told[torch.arange(len(ids)), ids].sum())
                assert scores[kind].log_prob == pytest.approx(likely, abs=5e-3, rel=5e-3), kind
                assert scores[kind].share == pytest.approx(float((told.argmax(-1) == ids).float().mean()))
                assert scores[kind].said == bool((told.argmax(-1) == ids).all())
            else:
                assert np.isnan(scores[kind].log_prob)
        weight.copy_(own)
        assert scores["edited"].kl > 0.01, "what changes nothing shows nothing"
