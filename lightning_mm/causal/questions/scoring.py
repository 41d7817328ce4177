"""A question with an answer behind it, teacher-forced: how likely the model finds that answer, token by token.

Data flow: ``Asker`` + question + answer -> ``Forced`` (inputs, where each answer token is foretold) -> ``heard``: the
log-probability of each token, and the most likely token in each place.

An answer is what greedy decoding writes exactly where each of its tokens is the most likely one.

Shapes: T tokens of the answer, V vocabulary.

What the model answers a question with, and whether that is right: only what it knows can be traced.

Data flow: ``Asked`` + the given answer -> ``forcing`` -> the token to follow, its probability, right or not.

An answer is right where each of its tokens is the most likely one given those before it: what greedy decoding writes.
Only its first token is followed (2406.04236).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mm.causal.questions.question import Asked, Asker, Question, last_logits
from lightning_mm.data.chat import ChatError
from lightning_mm.data.sample import Rejection
from lightning_mm.execution.loss import gathered_before
from lightning_mm.models.handle import MultimodalModel


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


def forced_logits(mm: MultimodalModel, each: Forced) -> Tensor:
    """(T + 1, V) float32 at ``positions``, by a plain forward pass, with its graph where gradients are on."""
    positions = each.positions.to(each.ids.device)
    with gathered_before(mm.model.get_submodule(mm.layout.head), positions):
        logits = mm.model(**each.asked.inputs, use_cache=False).logits
    return logits.reshape(len(positions), -1).float()


@torch.no_grad()
def heard(mm: MultimodalModel, each: Forced) -> Heard:
    """One forward pass of a model in eval mode; what it says is on the CPU."""
    logits_TV = forced_logits(mm, each)
    log_probs_TV = F.log_softmax(logits_TV, -1).cpu()
    ids, likeliest = each.ids.cpu(), logits_TV.argmax(-1).cpu()
    right = likeliest[: len(ids)] == ids
    log_probs = log_probs_TV[: len(ids)].gather(1, ids[:, None])[:, 0]
    return Heard(
        log_probs, likeliest, log_probs_TV[0], bool(right.all()), float(right.float().mean()) if len(ids) else 1.0
    )


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
    mm: MultimodalModel, asker: Asker, asked: Sequence[Asked], device: torch.device
) -> tuple[list[Answer], list[Rejection]]:
    """Ask the clean model everything."""
    found: list[Answer] = []
    rejected: list[Rejection] = []
    for each in asked:
        one = _answer(mm, asker, each, device)
        if isinstance(one, Answer):
            found.append(one)
        else:
            rejected.append(one)
    return found, rejected


def _answer(mm: MultimodalModel, asker: Asker, asked: Asked, device: torch.device) -> Answer | Rejection:
    question = asked.question
    if question.answer is None:
        chances = last_logits(mm, asked.inputs)[0].softmax(-1)
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
    said = heard(mm, behind.to(device))
    target = int(behind.ids[blanks])
    chances = last_logits(mm, asked.inputs)[0].softmax(-1) if blanks else said.first.exp()
    return Answer(asked, target, float(chances[target]), float(chances.max()), said.said, len(behind.ids) - blanks)


def _blanks(asker: Asker, ids: list[int]) -> int:
    """How many tokens at the beginning are blank: they say nothing of the answer, and are taken into the prompt."""
    told = (number for number, token in enumerate(ids) if asker.processor.tokenizer.decode([token]).strip())
    return next(told, 0)


def _begins(behind: Forced, further: Asked, blanks: int) -> bool:
    """Whether the longer prompt is the prompt and the answer's blanks."""
    ids, length = behind.asked.inputs["input_ids"][0], behind.prompt + blanks
    return further.length == length and torch.equal(further.inputs["input_ids"][0], ids[:length])
