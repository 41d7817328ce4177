"""Answers of the model: teacher-forced scores of a given answer, and whether the model answers a question correctly.

Data flow: question + answer -> ``force_answer`` -> ``ForcedAnswer`` (one row that includes the answer) ->
``score_answer`` -> ``AnswerScore``; ``EncodedQuestion``s -> ``answer_questions`` -> ``Answer``: the token to follow,
its probability, correct or not.

An answer is correct if each of its tokens is the most likely one given those before it, which is what greedy decoding
writes. Interventions follow the probability of its first token only (Basu et al. 2024, arXiv:2406.04236).

Shapes: T tokens of the answer, V vocabulary size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mm.causal.questions.question import EncodedQuestion, Question, QuestionEncoder, last_logits
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.chat import ChatError
from lightning_mm.data.sample import Rejection
from lightning_mm.execution.loss import gathered_before
from lightning_mm.models.handle import MultimodalModel


@dataclass(frozen=True, eq=False)
class ForcedAnswer:
    """A question followed by a given answer, for teacher forcing.

    Args:
        encoded: The encoded question; its inputs include the answer's tokens.
        answer: The answer's text.
        prompt: Number of tokens before the answer.
        ids: (T,) token ids of the answer, without end-of-turn tokens.
    """

    encoded: EncodedQuestion
    answer: str
    prompt: int
    ids: Tensor

    @property
    def positions(self) -> Tensor:
        """(T + 1,) positions whose logits predict the answer's tokens and the token after it."""
        return torch.arange(self.prompt - 1, self.prompt + len(self.ids))

    def to(self, device: torch.device) -> "ForcedAnswer":
        """A copy with its inputs and ids on ``device``; positions stay on the CPU."""
        return replace(self, encoded=self.encoded.to(device), ids=self.ids.to(device))


@dataclass(frozen=True, eq=False)
class AnswerScore:
    """Teacher-forced scores of an answer, on the CPU.

    Args:
        log_probs: (T,) log-probability of each token of the answer given those before it, in nats.
        predicted: (T + 1,) most likely token at each position of the answer, and after it.
        first_log_probs: (V,) log-probabilities at the answer's first token.
        is_greedy: Whether greedy decoding starts with this answer.
        token_accuracy: Fraction of the answer's tokens that are the most likely ones; 1 if it has none.
    """

    log_probs: Tensor
    predicted: Tensor
    first_log_probs: Tensor
    is_greedy: bool
    token_accuracy: float


def force_answer(
    encoder: QuestionEncoder, question: Question, answer: str, text: str | None = None
) -> ForcedAnswer | Rejection:
    """Encode a question followed by an answer; a ``Rejection`` if the two cannot be separated into tokens.

    Args:
        encoder: Encodes the question.
        question: The question.
        answer: The answer, rendered by the chat template; an empty one leaves the prompt alone.
        text: A paraphrase to use instead of the question's text; None: no paraphrase.
    """
    prompt = encoder.encode(question, text)
    try:
        whole = encoder.encode(question, text, encoder.render_answer(answer)) if answer.strip() else prompt
    except ChatError as error:
        return Rejection(question.id, str(error))
    if isinstance(prompt, Rejection) or isinstance(whole, Rejection):
        return prompt if isinstance(prompt, Rejection) else whole  # type: ignore[return-value]
    before, ids = prompt.inputs["input_ids"][0], whole.inputs["input_ids"][0]
    if not torch.equal(ids[: len(before)], before) or (answer.strip() and len(ids) == len(before)):
        return Rejection(question.id, f"answer runs into the prompt: {answer[:60]!r} has no tokens of its own")
    return ForcedAnswer(whole, answer, len(before), ids[len(before) :])


def answer_logits(mm: MultimodalModel, forced: ForcedAnswer) -> Tensor:
    """(T + 1, V) float32 logits at ``positions`` from one forward pass; differentiable if gradients are enabled."""
    positions = forced.positions.to(forced.ids.device)
    with gathered_before(mm.model.get_submodule(mm.layout.head), positions):
        logits = mm.model(**forced.encoded.inputs, use_cache=False).logits
    return logits.reshape(len(positions), -1).float()


@torch.no_grad()
def score_answer(mm: MultimodalModel, forced: ForcedAnswer) -> AnswerScore:
    """Score a teacher-forced answer with one forward pass of a model in eval mode."""
    logits_TV = answer_logits(mm, forced)
    log_probs_TV = F.log_softmax(logits_TV, -1).cpu()
    ids, predicted = forced.ids.cpu(), logits_TV.argmax(-1).cpu()
    is_hit = predicted[: len(ids)] == ids
    log_probs = log_probs_TV[: len(ids)].gather(1, ids[:, None])[:, 0]
    accuracy = float(is_hit.float().mean()) if len(ids) else 1.0
    return AnswerScore(log_probs, predicted, log_probs_TV[0], bool(is_hit.all()), accuracy)


@dataclass(frozen=True, eq=False)
class Answer:
    """The unmodified model's answer to one question.

    Args:
        encoded: The encoded question, on the CPU.
        target: First token of the correct answer, or of the model's own answer if the question has none.
        probability: Probability of the target.
        confidence: Probability of the most likely first token, correct or not.
        right: Whether greedy decoding gives the correct answer; True if the question has none.
        length: Number of tokens of the correct answer; 1 if the question has none.
    """

    encoded: EncodedQuestion
    target: int
    probability: float
    confidence: float
    right: bool
    length: int


def answer_questions(
    mm: MultimodalModel, encoder: QuestionEncoder, encoded: Sequence[EncodedQuestion], device: torch.device
) -> tuple[list[Answer], list[Rejection]]:
    """Ask the unmodified model all questions; returns its answers, and rejections of those that cannot be scored."""
    answers: list[Answer] = []
    rejected: list[Rejection] = []
    for each in encoded:
        one = _answer(mm, encoder, each, device)
        if isinstance(one, Answer):
            answers.append(one)
        else:
            rejected.append(one)
    return answers, rejected


def answer_until(
    mm: MultimodalModel,
    encoder: QuestionEncoder,
    questions: Sequence[Question],
    device: torch.device,
    num_correct: int,
    bf16: bool = False,
) -> tuple[list[Answer], list[Rejection]]:
    """Ask questions in order until ``num_correct`` are answered correctly; returns all answers and rejections.

    Args:
        mm: The unwrapped model in eval mode.
        encoder: Encodes questions for the model.
        questions: The questions.
        device: Device of the model.
        num_correct: Number of correct answers to stop at.
        bf16: Whether the forward pass runs under bfloat16 autocast.

    Raises:
        UserError: No question is answered correctly.
    """
    answers: list[Answer] = []
    rejected: list[Rejection] = []
    for question in questions:
        encoded = encoder.encode(question)
        if isinstance(encoded, Rejection):
            rejected.append(encoded)
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            new, lost = answer_questions(mm, encoder, [encoded], device)
        answers, rejected = [*answers, *new], [*rejected, *lost]
        if sum(answer.right for answer in answers) >= num_correct:
            break
    correct = [answer for answer in answers if answer.right]
    log_decision(
        "causal.questions",
        f"{len(correct)} of {len(answers)} answered right",
        "only what a model knows can be traced",
    )
    if num_long := sum(answer.length > 1 for answer in correct):
        log_decision("causal.answers", "the first token is followed", f"{num_long} of the right answers have several")
    if not correct:
        first = rejected[0].reason if rejected else "none of the greedy answers is the given one"
        raise UserError(
            "The model answers no question right.",
            f"{len(answers)} were asked; {first}.",
            "Trace a model that knows the answers, or leave the answers out: its own are followed then.",
        )
    return answers, rejected


def _answer(
    mm: MultimodalModel, encoder: QuestionEncoder, encoded: EncodedQuestion, device: torch.device
) -> Answer | Rejection:
    question = encoded.question
    if question.answer is None:
        probs = last_logits(mm, encoded.inputs)[0].softmax(-1)
        target = int(probs.argmax())
        return Answer(encoded, target, float(probs[target]), float(probs[target]), True, 1)
    forced = force_answer(encoder, question, question.answer)
    if isinstance(forced, Rejection):
        return forced
    decode = encoder.processor.tokenizer.decode
    # Whitespace tokens at the start of an answer carry no answer: they become part of the prompt.
    num_blank = next((number for number, token in enumerate(forced.ids.tolist()) if decode([token]).strip()), 0)
    if num_blank:
        rendered = encoder.render_answer(question.answer)
        longer = encoder.encode(question, answer=rendered[: len(rendered) - len(rendered.lstrip())])
        prompt_ids = forced.encoded.inputs["input_ids"][0][: forced.prompt + num_blank]
        if isinstance(longer, Rejection) or not torch.equal(longer.inputs["input_ids"][0], prompt_ids):
            return Rejection(question.id, "answer begins with a blank that cannot be put into the prompt")
        encoded = longer
    score = score_answer(mm, forced.to(device))
    target = int(forced.ids[num_blank])
    probs = last_logits(mm, encoded.inputs)[0].softmax(-1) if num_blank else score.first_log_probs.exp()
    length = len(forced.ids) - num_blank
    return Answer(encoded, target, float(probs[target]), float(probs.max()), score.is_greedy, length)
