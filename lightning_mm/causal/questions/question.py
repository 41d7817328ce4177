"""A question whose answer hangs on a constraint, and how the model is asked it.

Data flow: ``constraints`` reads Questions -> ``Asker`` (template, processor) -> ``Asked``: the inputs of one row, and
which of its tokens are the picture's, the constraint's, the rest of the question's.

Shapes: L tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mm.data import chat as spans
from lightning_mm.data import images as pictures
from lightning_mm.data.chat import ChatError
from lightning_mm.data.collator import RenderedSample, SampleEncoder
from lightning_mm.data.probe_sets.files import ObjectBox
from lightning_mm.data.sample import IMAGE_MARK, Rejection, Sample, Turn
from lightning_mm.execution.loss import gathered_before
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.processor import Processing

LATE = 1 / 16
"""Share of a picture's tokens that count as its last (2406.04236: 540 to 576 of 576)."""

TOKEN_CLASSES = ("image_early", "image_late", "constraint", "question", "template", "last")
"""Every token is of one class: the picture's, the constraint's, the rest of the question's, what the template adds, and
the last one, which the answer is read from."""


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        id: Unique within its file.
        text: As a person asks it.
        images: The pictures it is asked about; none for a question in text only.
        spans: Where in the text the constraint stands: first character and one past the last, in order.
        answer: What is right; None where the clean model's own answer is the target.
        boxes: Visual constraints: things in the picture that the answer hangs on.
        group: What intervals must not tear apart: the picture, mostly.
        kind: Sort of question, for accuracy by kind; empty where there is one only.
    """

    id: str
    text: str
    images: tuple[Path, ...]
    spans: tuple[tuple[int, int], ...]
    answer: str | None = None
    boxes: tuple[ObjectBox, ...] = ()
    group: str = ""
    kind: str = ""

    @property
    def constraint(self) -> str:
        """Its first words in the text; empty where there is none."""
        return self.text[slice(*self.spans[0])] if self.spans else ""


@dataclass(frozen=True, eq=False)
class Asked:
    """A question as the model takes it.

    Args:
        question: Which.
        inputs: Of one row without padding, ending where an answer would begin.
        tokens: What each of the L tokens is, to be shown; a picture's are empty.
        image: Positions of the picture's tokens.
        spans: Positions of the tokens of each of the constraint's spans.
        text: Positions of the question's tokens, the constraint's among them.
    """

    question: Question
    inputs: dict[str, Tensor]
    tokens: tuple[str, ...]
    image: Tensor
    spans: tuple[Tensor, ...]
    text: Tensor

    @property
    def length(self) -> int:
        """L."""
        return len(self.tokens)

    @property
    def constraint(self) -> Tensor:
        """(P,) positions of all the constraint's tokens, in order."""
        return torch.cat(self.spans) if self.spans else torch.empty(0, dtype=torch.long)

    @property
    def classes(self) -> tuple[str, ...]:
        """Of each token, one of ``TOKEN_CLASSES``."""
        found = ["template"] * self.length
        late = len(self.image) - max(1, round(LATE * len(self.image)))
        for positions, name in (
            (self.image[:late], "image_early"),
            (self.image[late:], "image_late"),
            (self.text, "question"),
            (self.constraint, "constraint"),
        ):
            for position in positions.tolist():
                found[position] = name
        found[-1] = "last"
        return tuple(found)

    def to(self, device: torch.device) -> "Asked":
        """With its inputs on the device; positions stay where they are."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Asked(self.question, inputs, self.tokens, self.image, self.spans, self.text)


class Asker:
    """Puts questions the way the model's template has them.

    Args:
        processing: The model's processor.
        prompt: How a question is worded; ``{question}`` stands for its text (2406.04236: "{question} Answer in a few
            words.").
        max_megapixels: Largest picture that is decoded.
    """

    def __init__(self, processing: Processing, prompt: str = "{question}", max_megapixels: float = 40.0) -> None:
        assert prompt.count("{question}") == 1, "checked where options are read"
        self._encoder, self.prompt = SampleEncoder(processing, None, max_megapixels), prompt

    def ask(self, question: Question, text: str | None = None, answer: str = "") -> Asked | Rejection:
        """One row, or why it cannot be made.

        Args:
            question: What to ask.
            text: Other words of the same question (a paraphrase), in which the constraint is not looked for.
            answer: Begin the answer with this text already.
        """
        worded = question.text if text is None else text
        before = self.prompt.index("{question}")
        said = self.prompt.replace("{question}", worded)
        turn = Turn("user", IMAGE_MARK * len(question.images) + ("\n" if question.images else "") + said)
        rejected: list[Rejection] = []
        try:
            rendered = self._encoder.chat.render((turn,), add_generation_prompt=True)
            sample = Sample(question.id, (turn,), question.images, origin=question.id)
            images = self._encoder.images(sample, len(question.images), rejected)
        except (ChatError, pictures.BadImage) as error:
            return Rejection(question.id, str(error))
        at = rendered.text.rfind(said)
        if at < 0:
            return Rejection(question.id, "template changes the question: it is not written as it was given")
        start = at + before
        wanted = [(start, start + len(worded)), *((start + a, start + b) for a, b in question.spans if text is None)]
        full = type(rendered)(rendered.text + answer, tuple(wanted))
        _, encoding = self._encoder.encode([RenderedSample(sample, images, full)], "right", rejected)
        if encoding is None:
            return rejected[0]
        found = spans.locate_answer_spans(full, self._encoder.chat.placeholder, encoding.texts[0])
        whole, *parts = (_positions(span, encoding.offsets[0]) for span in found)
        ids = encoding.inputs["input_ids"][0]
        image = torch.isin(ids, torch.tensor(self._encoder.processing.image_token_ids)).nonzero().flatten()
        return Asked(question, dict(encoding.inputs), self._shown(ids, image), image, tuple(parts), whole)

    @property
    def processor(self) -> Any:
        """The model's processor."""
        return self._encoder.processing.processor

    def reply(self, answer: str) -> str:
        """An answer as the template writes it behind the prompt, without what ends it: often a blank goes before it.

        Raises:
            ChatError: The template cannot write it.
        """
        rendered = self._encoder.chat.render((Turn("user", "?"), Turn("assistant", answer)))
        start, end = rendered.spans[0]
        written, said = rendered.text[start:end], answer.strip()
        return written[: written.index(said) + len(said)]

    def _shown(self, ids: Tensor, image: Tensor) -> tuple[str, ...]:
        tokenizer, pictured = self._encoder.processing.processor.tokenizer, set(image.tolist())
        return tuple("" if i in pictured else tokenizer.decode([token]) for i, token in enumerate(ids.tolist()))


def _positions(span: tuple[int, int], offsets: Tensor) -> Tensor:
    return torch.tensor(list(spans.tokens_of_span(span, offsets)), dtype=torch.long)


def asked(asker: Asker, questions: Sequence[Question]) -> tuple[list[Asked], list[Rejection]]:
    """All that can be asked, and what cannot, with the reason."""
    answers = [asker.ask(question) for question in questions]
    return [a for a in answers if isinstance(a, Asked)], [a for a in answers if isinstance(a, Rejection)]


@torch.no_grad()
def last_logits(mm: MultimodalModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, V) float32 logits at the last token, soft-capped and scaled as the model does it."""
    inputs = on_device(mm, inputs)
    rows, length = inputs["input_ids"].shape
    last = torch.arange(1, rows + 1, device=inputs["input_ids"].device) * length - 1
    with gathered_before(mm.model.get_submodule(mm.layout.head), last):
        logits = mm.model(**inputs, use_cache=False).logits
    return logits.reshape(rows, -1).float()


def on_device(mm: MultimodalModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs where the model is: questions wait in the host's memory, where there is more of it."""
    device = next(mm.model.get_submodule(mm.layout.embedding).parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}
