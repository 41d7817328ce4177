"""What a model answers, told as its greedy decoding tells it; a question that cannot be traced leaves the others be."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.causal import study as studied
from lightning_mm.causal.questions.question import Asked
from lightning_mm.causal.questions.scoring import answered
from lightning_mm.causal.study import Studying, study
from lightning_mm.core.errors import UserError
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.processor import load_processing
from tests.helpers.causal_models import Subject, subject
from tests.helpers.taught_models import KNOWN, Taught

CPU = torch.device("cpu")


@torch.no_grad()
def greedy(model: Any, asked: Asked, count: int) -> list[int]:
    written = model.generate(**asked.inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return [int(token) for token in written[0, asked.length :]]


def test_right_is_what_greedy_decoding_writes(known: Callable[[str], Taught]) -> None:
    one = known("llava")
    asked = [one.asker.ask(one.question(word)) for word in KNOWN]
    assert all(isinstance(each, Asked) for each in asked)
    every = [each for each in asked if isinstance(each, Asked)]
    every.append(replace(every[0], question=replace(every[0].question, answer="zoo")))
    answers, lost = answered(one.mm, one.asker, every, CPU)
    assert not lost
    assert [answer.right for answer in answers] == [True] * len(KNOWN) + [False]
    for answer in answers:
        if answer.right:
            assert greedy(one.model, answer.asked, 1) == [answer.target]


def test_a_blank_before_the_answer_belongs_to_the_prompt(family: Callable[[str], Path], tmp_path: Path) -> None:
    """This tokenizer writes the blank that the chat format puts before an answer as a token of its own."""
    one: Subject = subject(family, "llava", tmp_path)
    asked = one.ask()
    asked = replace(asked, question=replace(asked.question, answer="7Q"))
    (found,), _ = answered(one.mm, one.asker, [asked], CPU)
    decode = one.processing.processor.tokenizer.decode
    behind = decode(found.asked.inputs["input_ids"][0, asked.length :])
    assert behind == " ", "what was taken into the prompt"
    assert "7Q".startswith(decode([found.target])), "what is followed says something of the answer"
    chances = one.model(**found.asked.inputs).logits[0, -1].softmax(-1)
    assert found.probability == pytest.approx(float(chances[found.target]), rel=1e-5)


def test_a_question_that_cannot_be_traced_leaves_the_others_be(
    known: Callable[[str], Taught], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = known("llava")
    asked = [each for word in KNOWN if isinstance(each := one.asker.ask(one.question(word)), Asked)]
    answers, _ = answered(one.mm, one.asker, asked, CPU)
    real = studied.trace

    def refusing(*args: Any) -> Any:
        if args[2].question.id == "c":
            raise UserError("This one cannot be traced.", "Its layers are shared.", "Leave it out.")
        return real(*args)

    monkeypatch.setattr(studied, "trace", refusing)
    examined = MultimodalModel(one.model, one.layout, load_processing(str(one.folder)))
    found = study(examined, answers, Studying(parts=("trace",), shown=0), {})
    assert [each.origin for each in found.rejected] == ["c"]
    assert "Its layers are shared" in found.rejected[0].reason
    assert len(found.traces) == len(KNOWN) - 1
    assert not found.findings.problems, "the others are measured"
