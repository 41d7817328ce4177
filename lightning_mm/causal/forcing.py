"""A question with an answer behind it, teacher-forced: how likely the model finds that answer, token by token.

Data flow: ``Asker`` + question + answer -> ``Forced`` (inputs, where each answer token is foretold) -> ``heard``: the
log-probability of each token, and the most likely token in each place.

An answer is what greedy decoding writes exactly where each of its tokens is the most likely one.

Shapes: T tokens of the answer, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mm.causal.questions import Asked, Asker, Question
from lightning_mm.data.chat import ChatError
from lightning_mm.data.sample import Rejection
from lightning_mm.models.anatomy import Anatomy
from lightning_mm.objective import gathered_before


@dataclass(frozen=True, eq=False)
class Forced:
    """A question and one answer to it.

    Args:
        asked: Its inputs hold the answer too.
        answer: As given.
        prompt: How many tokens there are before the answer.
        ids: (T,) the answer's tokens, without what ends it.
    """

    asked: Asked
    answer: str
    prompt: int
    ids: Tensor

    @property
    def positions(self) -> Tensor:
        """(T + 1,) tokens that foretell the answer's, and what comes after it."""
        return torch.arange(self.prompt - 1, self.prompt + len(self.ids))

    def to(self, device: torch.device) -> "Forced":
        """With its inputs and ids on the device; positions stay where they are."""
        return replace(self, asked=self.asked.to(device), ids=self.ids.to(device))


@dataclass(frozen=True, eq=False)
class Heard:
    """What the model makes of it.

    Args:
        log_probs: (T,) of each token of the answer, given those before it.
        likeliest: (T + 1,) the most likely token in each place, and behind the answer.
        first: (V,) log-probabilities of the first token.
        said: Whether greedy decoding begins with this answer.
        share: Of its tokens that are the most likely ones; 1 where it has none.
    """

    log_probs: Tensor
    likeliest: Tensor
    first: Tensor
    said: bool
    share: float


def forced(asker: Asker, question: Question, answer: str, text: str | None = None) -> Forced | Rejection:
    """Put an answer behind a question, the way the template writes it; an empty one leaves the prompt alone.

    Args:
        asker: Of the model.
        question: What is asked.
        answer: What is answered.
        text: Other words of the question.
    """
    prompt = asker.ask(question, text)
    try:
        whole = asker.ask(question, text, asker.reply(answer)) if answer.strip() else prompt
    except ChatError as error:
        return Rejection(question.id, str(error))
    if isinstance(prompt, Rejection) or isinstance(whole, Rejection):
        return prompt if isinstance(prompt, Rejection) else whole  # type: ignore[return-value]
    before, ids = prompt.inputs["input_ids"][0], whole.inputs["input_ids"][0]
    if not torch.equal(ids[: len(before)], before) or (answer.strip() and len(ids) == len(before)):
        return Rejection(question.id, f"answer runs into the prompt: {answer[:60]!r} has no tokens of its own")
    return Forced(whole, answer, len(before), ids[len(before) :])


def forced_logits(model: Any, anatomy: Anatomy, each: Forced) -> Tensor:
    """(T + 1, V) float32 at ``positions``, by a plain forward pass, with its graph where gradients are on."""
    positions = each.positions.to(each.ids.device)
    with gathered_before(model.get_submodule(anatomy.head), positions):
        logits = model(**each.asked.inputs, use_cache=False).logits
    return logits.reshape(len(positions), -1).float()


@torch.no_grad()
def heard(model: Any, anatomy: Anatomy, each: Forced) -> Heard:
    """One forward pass of a model in eval mode; what it says is on the CPU."""
    logits_TV = forced_logits(model, anatomy, each)
    log_probs_TV = F.log_softmax(logits_TV, -1).cpu()
    ids, likeliest = each.ids.cpu(), logits_TV.argmax(-1).cpu()
    right = likeliest[: len(ids)] == ids
    log_probs = log_probs_TV[: len(ids)].gather(1, ids[:, None])[:, 0]
    return Heard(
        log_probs, likeliest, log_probs_TV[0], bool(right.all()), float(right.float().mean()) if len(ids) else 1.0
    )
