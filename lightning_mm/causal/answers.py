"""What the model answers a question with, and whether that is right: only what it knows can be traced.

Data flow: ``Asked`` + the given answer -> ``forcing`` -> the token to follow, its probability, right or not.

An answer is right where each of its tokens is the most likely one given those before it: what greedy decoding writes.
Only its first token is followed (2406.04236).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_mm.causal.forcing import Forced, forced, heard
from lightning_mm.causal.questions import Asked, Asker
from lightning_mm.causal.recording import last_logits
from lightning_mm.data.sample import Rejection
from lightning_mm.models.anatomy import Anatomy


@dataclass(frozen=True, eq=False)
class Answer:
    """The clean model's word on one question.

    Args:
        asked: The question, where it was: it goes to the model's device when it is asked.
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
        one = _answer(model, anatomy, asker, each, device)
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
    blanks = _blanks(asker, behind.ids.tolist())
    if blanks:
        reply = asker.reply(question.answer)
        further = asker.ask(question, answer=reply[: len(reply) - len(reply.lstrip())])
        if isinstance(further, Rejection) or not _begins(behind, further, blanks):
            return Rejection(question.id, "answer begins with a blank that cannot be put into the prompt")
        asked = further
    said = heard(model, anatomy, behind.to(device))
    target = int(behind.ids[blanks])
    chances = last_logits(model, anatomy, asked.inputs)[0].softmax(-1) if blanks else said.first.exp()
    return Answer(asked, target, float(chances[target]), float(chances.max()), said.said, len(behind.ids) - blanks)


def _blanks(asker: Asker, ids: list[int]) -> int:
    """How many tokens at the beginning are blank: they say nothing of the answer, and are taken into the prompt."""
    told = (number for number, token in enumerate(ids) if asker.processor.tokenizer.decode([token]).strip())
    return next(told, 0)


def _begins(behind: Forced, further: Asked, blanks: int) -> bool:
    """Whether the longer prompt is the prompt and the answer's blanks."""
    ids, length = behind.asked.inputs["input_ids"][0], behind.prompt + blanks
    return further.length == length and torch.equal(further.inputs["input_ids"][0], ids[:length])
