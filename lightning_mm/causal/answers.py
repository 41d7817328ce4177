"""What the model answers a question with, and whether that is right: only what it knows can be traced.

Data flow: ``Asked`` + the given answer -> ``forcing`` -> the token to follow, its probability, right or not.

An answer is right where each of its tokens is the most likely one given those before it: what greedy decoding writes.
Only its first token is followed (2406.04236).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_mm.causal.forcing import forced, heard
from lightning_mm.causal.questions import Asked, Asker
from lightning_mm.causal.recording import last_logits
from lightning_mm.data.sample import Rejection
from lightning_mm.models.anatomy import Anatomy


@dataclass(frozen=True, eq=False)
class Answer:
    """The clean model's word on one question.

    Args:
        asked: The question, on the model's device.
        target: First token of the right answer; where none is given, of the model's own.
        probability: Of that token.
        confidence: Of the token that the model answers with, right or not.
        right: Whether greedy decoding gives the answer; True where none is given.
        length: Tokens of the given answer; 1 where none is given.
    """

    asked: Asked
    target: int
    probability: float
    confidence: float
    right: bool
    length: int


def answered(
    model: Any, anatomy: Anatomy, asker: Asker, asked: Sequence[Asked], device: torch.device
) -> tuple[list[Answer], list[Rejection]]:
    """Ask the clean model everything."""
    found: list[Answer] = []
    rejected: list[Rejection] = []
    for each in asked:
        one = _answer(model, anatomy, asker, each.to(device), device)
        if isinstance(one, Answer):
            found.append(one)
        else:
            rejected.append(one)
    return found, rejected


def _answer(model: Any, anatomy: Anatomy, asker: Asker, asked: Asked, device: torch.device) -> Answer | Rejection:
    question = asked.question
    if question.answer is None:
        chances = last_logits(model, anatomy, asked.inputs)[0].softmax(-1)
        target = int(chances.argmax())
        return Answer(asked, target, float(chances[target]), float(chances[target]), True, 1)
    behind = forced(asker, question, question.answer)
    if isinstance(behind, Rejection):
        return behind
    first = int(behind.ids[0])
    if not asker.processor.tokenizer.decode([first]).strip():
        return Rejection(question.id, "answer begins with a blank token: it says nothing of the answer")
    said = heard(model, anatomy, behind.to(device))
    chances = said.first.exp()
    return Answer(asked, first, float(chances[first]), float(chances.max()), said.said, len(behind.ids))
