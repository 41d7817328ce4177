"""Which questions a model answers exactly, by teacher forcing in batches.

An answer is exact if each of its tokens, the end of the turn included, is the most likely one given those before it:
greedy decoding then writes that answer. Beside that, the choice: the most likely first token among those of all answers
that its question type has in the test, which a model can get right that answers in another form.

Data flow: rows of a test -> the data module's loader -> ``module.objective`` with the head's logits recorded -> one
``Answer`` per question.

Shapes: B rows, L tokens, S supervised positions, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.sample import Sample, Turn
from lightning_mm.study.inputs import Asked
from lightning_mm.training.module import MMModule

_MOST_CHOICES = 24
"""Types with more different answers are not asked for a choice."""
Choices = Mapping[str, Mapping[str, int]]
"""Question type -> answer -> its first token."""


@dataclass(frozen=True)
class Answer:
    """How a model answered one question.

    Args:
        question: ``row.answer``: number of the row in its test, and of the answer in the row.
        exact: Whether every token of the answer is the most likely one.
        choice: Whether its first token is the most likely among those of all answers of its type; None: not asked.
        nats: Negative log-likelihood of the answer, summed over its tokens.
    """

    question: str
    exact: bool
    choice: bool | None
    nats: float


@dataclass(frozen=True)
class _Place:
    """Where the tokens of one answer are among the supervised positions of a batch: [begin, end)."""

    sample: Sample
    index: int
    begin: int
    end: int

    @property
    def turn(self) -> Turn:
        return self.sample.turns[self.sample.answers[self.index]]


def test_data(data: MMDataModule, asked: Asked, eval_batch_size: int) -> MMDataModule:
    """A data module of one file of questions, with the options of the fit.

    Args:
        data: The fit's.
        asked: The file.
        eval_batch_size: Rows of a forward pass.
    """
    changed: dict[str, Any] = {"train": None, "val": None, "predict": None, "test": str(asked.file), "image_root": "/"}
    changed |= {"eval_batch_size": eval_batch_size, "max_length": data.max_length}
    made = MMDataModule(**{**data.arguments, **changed})
    made.setup("test")
    return made


def ask(module: MMModule, data: MMDataModule, choices: Choices, autocast: AbstractContextManager[Any]) -> list[Answer]:
    """The answers to all questions of a test, in the order of the file.

    Args:
        module: A model that is loaded, in eval mode.
        data: Of the test (``test_data``).
        choices: As ``first_tokens`` finds them.
        autocast: Context of the forward passes.
    """
    found: list[Answer] = []
    lost = 0
    loader = data.test_dataloader()[0]
    device = module.mm.device
    with torch.no_grad(), autocast:
        for batch in loader:
            places = answer_places(batch)
            lost += len(batch.rejected)
            found += _answers(module, batch.to(device), places, choices)
    if lost:
        log_decision("study.tests", f"{lost} rows are not asked, or cut", "the collator cannot use them whole")
    if not found:
        raise UserError("No question of a test can be asked.", "All were rejected.", "See data.max_length.")
    order = [sample.id for sample in data.samples("test")]
    rank = {name: number for number, name in enumerate(order)}
    return sorted(found, key=lambda answer: (rank[answer.question.partition(".")[0]], answer.question))


def answer_places(batch: Batch) -> list[_Place]:
    """The answers of a batch: each a run of supervised positions without a gap.

    A row whose runs are not as many as its answers (some were cut off) is left out.
    """
    length = batch.regions.shape[1]
    positions = batch.supervised.tolist()
    runs: dict[int, list[list[int]]] = {}
    for number, position in enumerate(positions):
        row = position // length
        held = runs.setdefault(row, [])
        if held and position == positions[number - 1] + 1:
            held[-1][1] = number + 1
        else:
            held.append([number, number + 1])
    found = []
    for row, sample in enumerate(batch.samples):
        own = runs.get(row, [])
        if len(own) == len(sample.answers):
            found += [_Place(sample, index, *run) for index, run in enumerate(own)]
    return found


def _answers(module: MMModule, batch: Batch, places: Sequence[_Place], choices: Choices) -> list[Answer]:
    """Answers of one batch."""
    with _recorded_logits(module.mm.head) as parts:
        objective = module.objective(batch)
    logits_SV = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    assert len(logits_SV) == batch.num_supervised, "the head gave logits of other positions"
    right_S = (logits_SV.argmax(-1) == batch.targets).tolist()
    nats_S = objective.token_nll.float().tolist()
    return [
        Answer(
            f"{place.sample.id}.{place.index}",
            all(right_S[place.begin : place.end]),
            _chosen(logits_SV[place.begin], int(batch.targets[place.begin]), choices.get(place.turn.question_type)),
            sum(nats_S[place.begin : place.end]),
        )
        for place in places
    ]


def _chosen(logits_V: Tensor, target: int, candidates: Mapping[str, int] | None) -> bool | None:
    """Whether the answer's first token is the most likely among the candidates'; None without candidates."""
    if not candidates or target not in candidates.values():
        return None
    ids = torch.tensor(sorted(candidates.values()), device=logits_V.device)
    return int(ids[logits_V[ids].argmax()]) == target


@contextmanager
def _recorded_logits(head: nn.Module) -> Iterator[list[Tensor]]:
    """While active, what the head returns is appended to the list; calls on no position leave nothing."""
    held: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        if output.numel():
            held.append(output.detach())

    handle = head.register_forward_hook(keep)
    try:
        yield held
    finally:
        handle.remove()


def first_tokens(data: MMDataModule) -> dict[str, dict[str, int]]:
    """The first token of every answer that a question type has, of types where these tell the answers apart.

    Args:
        data: Of the test, with the pictures of its own.
    """
    firsts: dict[str, dict[str, Sample]] = {}
    for sample in data.samples("test"):
        if len(sample.answers) == 1:
            turn = sample.turns[sample.answers[0]]
            firsts.setdefault(turn.question_type, {}).setdefault(turn.text, sample)
    few = {kind: answers for kind, answers in firsts.items() if 2 <= len(answers) <= _MOST_CHOICES}
    collate = data.collator()
    found: dict[str, dict[str, int]] = {}
    for kind, answers in few.items():
        batch = collate(list(answers.values()))
        tokens = {place.turn.text: int(batch.targets[place.begin]) for place in answer_places(batch)}
        if len(set(tokens.values())) == len(answers):
            found[kind] = tokens
        else:
            log_decision(f"study.choice.{kind}", "not asked", "several of its answers begin with the same token")
    return found
