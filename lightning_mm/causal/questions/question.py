"""Questions with constraints, and their encoding as one row of model inputs.

A constraint is the part of a question that determines the answer ("the country with this flag"), as in
Basu et al. 2024, arXiv:2406.04236.

Data flow: ``files.read_questions`` -> ``Question`` -> ``QuestionEncoder`` (chat template, processor) ->
``EncodedQuestion``: inputs of one row, and the positions of the image, constraint and question tokens in it.

Shapes: B rows, L tokens, P positions, V vocabulary size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mm.data import chat
from lightning_mm.data import images as image_files
from lightning_mm.data.chat import ChatError
from lightning_mm.data.probe_sets.files import ObjectBox
from lightning_mm.data.sample import IMAGE_MARK, Rejection, Sample, Turn
from lightning_mm.data.sample_encoder import RenderedSample, SampleEncoder
from lightning_mm.execution.loss import select_positions_before_head
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.processor import ModelProcessor

LATE_IMAGE_FRACTION = 1 / 16
"""Fraction of an image's tokens that count as late (Basu et al. 2024, arXiv:2406.04236: 540 to 576 of 576)."""

P2_PROMPT = "{question}? Answer in a few words."
"""Wording of the code released with Basu et al. 2024, arXiv:2406.04236; it ends every question, complete or not."""

TOKEN_CLASSES = ("image_early", "image_late", "constraint", "question", "template", "last")
"""Every token has one class: image, constraint, rest of the question, chat template, or the last token, whose logits
give the answer."""


@dataclass(frozen=True)
class Question:
    """One question, its images, its constraints and its answer.

    Args:
        id: Unique within its file.
        text: The question without chat template and image markers.
        images: Image files that the question is about; empty for a text-only question.
        spans: Character ranges of the constraints in ``text``: (first, one past the last), in order.
        answer: The correct answer; None: the unmodified model's own answer is the target.
        boxes: Visual constraints: objects in the image that determine the answer.
        group: Cluster id for confidence intervals, usually the image; empty: the question is a cluster of its own.
        kind: Question type, for results by type; empty if there is only one.
        first: Index in ``spans`` of the place that one-place protocols take (Basu et al. 2024 as released): the first
            that is written as the constraint is, upper and lower case included, else the first.
    """

    id: str
    text: str
    images: tuple[Path, ...]
    spans: tuple[tuple[int, int], ...]
    answer: str | None = None
    boxes: tuple[ObjectBox, ...] = ()
    group: str = ""
    kind: str = ""
    first: int = 0

    @property
    def constraint(self) -> str:
        """The text of the first constraint; empty if there is none."""
        return self.text[slice(*self.spans[0])] if self.spans else ""


@dataclass(frozen=True, eq=False)
class EncodedQuestion:
    """A question as model inputs, with the positions of its parts.

    Args:
        question: The question that was encoded.
        inputs: Model inputs, (1, L) and the image tensors, without padding, ending where the answer begins.
        tokens: (L) decoded tokens, for display; image tokens are empty strings.
        image: (P,) positions of the image tokens, over all images.
        spans: Positions of the tokens of each constraint, one tensor per range in ``question.spans``.
        text: (P,) positions of all tokens of the question text, constraint included.
    """

    question: Question
    inputs: dict[str, Tensor]
    tokens: tuple[str, ...]
    image: Tensor
    spans: tuple[Tensor, ...]
    text: Tensor

    @property
    def length(self) -> int:
        """L, the number of tokens."""
        return len(self.tokens)

    @property
    def constraint(self) -> Tensor:
        """(P,) positions of the tokens of all constraints, in order."""
        return torch.cat(self.spans) if self.spans else torch.empty(0, dtype=torch.long)

    @property
    def first_place(self) -> Tensor:
        """(P,) positions of the tokens of the constraint's first place, ``question.first``; empty without one."""
        return self.spans[self.question.first] if self.spans else self.constraint

    @property
    def classes(self) -> tuple[str, ...]:
        """(L) class of each token, one of ``TOKEN_CLASSES``."""
        classes = ["template"] * self.length
        late = len(self.image) - max(1, round(LATE_IMAGE_FRACTION * len(self.image)))
        for positions, name in (
            (self.image[:late], "image_early"),
            (self.image[late:], "image_late"),
            (self.text, "question"),
            (self.constraint, "constraint"),
        ):
            for position in positions.tolist():
                classes[position] = name
        classes[-1] = "last"
        return tuple(classes)

    def to(self, device: torch.device) -> "EncodedQuestion":
        """A copy with its inputs on ``device``; positions stay on the CPU."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return EncodedQuestion(self.question, inputs, self.tokens, self.image, self.spans, self.text)


class QuestionEncoder:
    """Encodes questions with the model's chat template and processor.

    Args:
        processing: The model's processor.
        prompt: Format of the user turn, containing ``{question}`` once, such as ``P2_PROMPT``.
        max_megapixels: Larger images are rejected, in millions of pixels.
    """

    def __init__(self, processing: ModelProcessor, prompt: str = "{question}", max_megapixels: float = 40.0) -> None:
        assert prompt.count("{question}") == 1, "checked where options are read"
        self._encoder, self.prompt = SampleEncoder(processing, None, max_megapixels), prompt

    def encode(self, question: Question, text: str | None = None, answer: str = "") -> EncodedQuestion | Rejection:
        """Encode a question as one row; a ``Rejection`` with the reason if it cannot be encoded.

        Args:
            question: The question to encode.
            text: A paraphrase to use instead of the question's text, without constraint positions; None: no paraphrase.
            answer: Text that is appended as the beginning of the answer.
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
        except (ChatError, image_files.BadImage) as error:
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
        expanded = chat.locate_answer_spans(full, self._encoder.chat.placeholder, encoding.texts[0])
        whole, *parts = (_positions(span, encoding.offsets[0]) for span in expanded)
        ids = encoding.inputs["input_ids"][0]
        image = torch.isin(ids, torch.tensor(self._encoder.processing.image_token_ids)).nonzero().flatten()
        return EncodedQuestion(question, dict(encoding.inputs), self._decode(ids, image), image, tuple(parts), whole)

    @property
    def processor(self) -> Any:
        """The Hugging Face processor."""
        return self._encoder.processing.processor

    def render_answer(self, answer: str) -> str:
        """An answer as the chat template renders it after the prompt, without the end of turn; may start with a space.

        Raises:
            ChatError: The template cannot render it.
        """
        rendered = self._encoder.chat.render((Turn("user", "?"), Turn("assistant", answer)))
        start, end = rendered.spans[0]
        written, said = rendered.text[start:end], answer.strip()
        return written[: written.index(said) + len(said)]

    def _decode(self, ids: Tensor, image: Tensor) -> tuple[str, ...]:
        tokenizer, pictured = self._encoder.processing.processor.tokenizer, set(image.tolist())
        return tuple("" if i in pictured else tokenizer.decode([token]) for i, token in enumerate(ids.tolist()))


def _positions(span: tuple[int, int], offsets: Tensor) -> Tensor:
    return torch.tensor(list(chat.tokens_of_span(span, offsets)), dtype=torch.long)


@torch.no_grad()
def last_logits(mm: MultimodalModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, V) float32 logits at the last token of rows without padding, computed for that position only."""
    inputs = to_model_device(mm, inputs)
    rows, length = inputs["input_ids"].shape
    last = torch.arange(1, rows + 1, device=inputs["input_ids"].device) * length - 1
    with select_positions_before_head(mm.model.get_submodule(mm.layout.head), last):
        logits = mm.model(**inputs, use_cache=False).logits
    return logits.reshape(rows, -1).float()


def to_model_device(mm: MultimodalModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs on the device of the model's token embedding; encoded questions are kept on the CPU."""
    device = next(mm.model.get_submodule(mm.layout.embedding).parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}
