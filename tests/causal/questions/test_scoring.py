"""What a model answers, told as its greedy decoding tells it; a question that cannot be traced leaves the others be."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.causal import study as study_module
from lightning_mm.causal.questions.question import EncodedQuestion
from lightning_mm.causal.questions.scoring import answer_questions
from lightning_mm.causal.study import StudyConfig, run_study
from lightning_mm.core.errors import UserError
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.processor import load_processing
from tests.helpers.causal_models import Subject, subject
from tests.helpers.taught_models import KNOWN, Taught

CPU = torch.device("cpu")


@torch.no_grad()
def greedy(model: Any, encoded: EncodedQuestion, count: int) -> list[int]:
    written = model.generate(**encoded.inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return [int(token) for token in written[0, encoded.length :]]


def test_right_is_what_greedy_decoding_writes(known: Callable[[str], Taught]) -> None:
    one = known("llava")
    encoded = [one.encoder.encode(one.question(word)) for word in KNOWN]
    assert all(isinstance(each, EncodedQuestion) for each in encoded)
    every = [each for each in encoded if isinstance(each, EncodedQuestion)]
    every.append(replace(every[0], question=replace(every[0].question, answer="zoo")))
    answers, lost = answer_questions(one.mm, one.encoder, every, CPU)
    assert not lost
    assert [answer.right for answer in answers] == [True] * len(KNOWN) + [False]
    for answer in answers:
        if answer.right:
            assert greedy(one.model, answer.encoded, 1) == [answer.target]


def test_a_blank_before_the_answer_belongs_to_the_prompt(family: Callable[[str], Path], tmp_path: Path) -> None:
    """This tokenizer writes the blank that the chat format puts before an answer as a token of its own."""
    one: Subject = subject(family, "llava", tmp_path)
    encoded = one.encode()
    encoded = replace(encoded, question=replace(encoded.question, answer="7Q"))
    (found,), _ = answer_questions(one.mm, one.encoder, [encoded], CPU)
    decode = one.processing.processor.tokenizer.decode
    behind = decode(found.encoded.inputs["input_ids"][0, encoded.length :])
    assert behind == " ", "what was taken into the prompt"
    assert "7Q".startswith(decode([found.target])), "what is followed says something of the answer"
    chances = one.model(**found.encoded.inputs).logits[0, -1].softmax(-1)
    assert found.probability == pytest.approx(float(chances[found.target]), rel=1e-5)


def test_a_question_that_cannot_be_traced_leaves_the_others_be(
    known: Callable[[str], Taught], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = known("llava")
    encoded = [each for word in KNOWN if isinstance(each := one.encoder.encode(one.question(word)), EncodedQuestion)]
    answers, _ = answer_questions(one.mm, one.encoder, encoded, CPU)
    real = study_module.causal_trace

    def refusing(*args: Any) -> Any:
        if args[1].question.id == "c":
            raise UserError("This one cannot be traced.", "Its layers are shared.", "Leave it out.")
        return real(*args)

    monkeypatch.setattr(study_module, "causal_trace", refusing)
    examined = MultimodalModel(one.model, one.layout, load_processing(str(one.folder)))
    found = run_study(examined, answers, StudyConfig(parts=("trace",), num_shown=0), {})
    assert [each.origin for each in found.rejected] == ["c"]
    assert "Its layers are shared" in found.rejected[0].reason
    assert len(found.traces) == len(KNOWN) - 1
    assert not found.findings.problems, "the others are measured"
