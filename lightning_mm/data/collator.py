"""Collators: Samples to training batches, and questions to prompts for generation.

A sample that cannot be used is rejected with its reason; the rest of the batch stays. Collators use no randomness and
keep no state between calls.

Data flow: list[Sample] -> ``sample_encoder`` (decoded images, text of the chat template, one call of the processor) ->
token positions of the answers, truncation -> ``Batch``;
list[(Sample, turn)] -> the same up to that turn, ending with the generation prompt -> ``PromptBatch``.

Shapes: B samples, L tokens after padding, S supervised positions of the whole batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_mm.core.errors import UserError
from lightning_mm.data import chat, videos
from lightning_mm.data import images as pictures
from lightning_mm.data.batch import Batch, PromptBatch, TokenRegion
from lightning_mm.data.chat import ChatError
from lightning_mm.data.sample import Rejection, Sample
from lightning_mm.data.sample_encoder import RenderedSample, SampleEncoder, gray_image
from lightning_mm.models.encoding import Encoding
from lightning_mm.models.processor import ModelProcessor

_MAX_SUBSTITUTES = 64
_FEWER = "; data.max_pixels makes pictures take fewer tokens"


class Collator:
    """Makes training batches.

    Args:
        processing: The model's processor.
        max_length: Limit on the tokens of a row. A longer row is truncated if that removes no image token and leaves an
            answer token, and is rejected otherwise; None sets no limit.
        max_megapixels: Limit on the size of an image, in megapixels.
        reserve: Samples that replace a batch of which every sample is rejected. The batch then supervises nothing, but
            the model runs, and no rank waits for another.
        options: Further arguments of ``SampleEncoder``: max_images, video_frames, special_tokens.

    Raises:
        UserError: The model's chat template cannot be used.

    Attributes:
        encoder: Decodes images and calls the processor, within the limits.
    """

    def __init__(
        self,
        processing: ModelProcessor,
        max_length: int | None = None,
        *,
        max_megapixels: float = 40.0,
        reserve: Sequence[Sample] = (),
        **options: Any,
    ) -> None:
        self.encoder = SampleEncoder(processing, max_length, max_megapixels, **options)
        self._reserve = reserve

    @property
    def processing(self) -> ModelProcessor:
        """The model's processor."""
        return self.encoder.processing

    @property
    def video_frames(self) -> int:
        """Frames per video."""
        return self.encoder.video_frames

    def require_decoder(self) -> None:
        """Refuse to train on videos without the package that decodes them, if the model takes any.

        Raises:
            UserError: It is not installed.
        """
        if self.encoder.takes_several_images:
            videos.require_decoder()

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """A batch of the samples that can be used.

        Args:
            samples: B samples.

        Raises:
            UserError: None of them can be used, and none of the reserve either.
        """
        rejected: list[Rejection] = []
        batch = self.collate_valid(samples, rejected)
        for substitute in self._reserve[:_MAX_SUBSTITUTES] if batch is None else ():
            if (batch := self.collate_valid([substitute], [])) is not None:
                batch = replace(batch, supervised=batch.supervised[:0], targets=batch.targets[:0])
                break
        if batch is None:
            first = rejected[0]
            raise UserError(
                f"None of {len(samples)} samples can be made into a batch.",
                f"{first.origin}: {first.reason}.",
                "If it is the length, raise data.max_length or set data.max_pixels; else mend or remove such rows.",
            )
        return replace(batch, rejected=tuple(rejected))

    def collate_valid(
        self, samples: Sequence[Sample], rejected: list[Rejection], *, blank_images: bool = False
    ) -> Batch | None:
        """A batch of the samples that can be used; None where none can.

        Args:
            samples: Samples to encode.
            rejected: Samples that cannot be used are added to it.
            blank_images: Whether each image is replaced by a gray one of its size, without decoding it.
        """
        rows = [row for sample in samples if (row := self._row(sample, rejected, blank_images))]
        while rows:
            rows, encoding = self.encoder.encode(rows, "right", rejected)
            if encoding is None:
                return None
            answers = [self._answers(row, encoding, b) for b, row in enumerate(rows)]
            faults = [self._fault(encoding, b, answer) for b, answer in enumerate(answers)]
            rejected += [Rejection(row.sample.origin, fault) for row, fault in zip(rows, faults, strict=True) if fault]
            if not any(faults):
                return self._assemble(rows, encoding, answers, rejected)
            rows = [row for row, fault in zip(rows, faults, strict=True) if not fault]
        return None

    def _row(self, sample: Sample, rejected: list[Rejection], blank_images: bool) -> RenderedSample | None:
        try:
            if not sample.answers:
                raise ChatError("no answer: no turn of the row is to be learned")
            row = self.encoder.row(sample, len(sample.turns), rejected, blank_images=blank_images)
            if not row.rendered.spans:
                raise ChatError("no answer: the chat template writes every one to be learned as context only")
        except (ChatError, pictures.BadImage) as error:
            rejected.append(Rejection(sample.origin, str(error)))
            return None
        if num := row.rendered.num_context:
            reason = f"earlier answers: {num} only context, since the chat template writes them without reasoning"
            rejected.append(Rejection(sample.origin, reason, "cut"))
        return row

    def _answers(self, row: RenderedSample, encoding: Encoding, b: int) -> list[int]:
        """Token positions of the answers of row ``b``."""
        found = chat.locate_answer_spans(row.rendered, self.encoder.chat.placeholder, encoding.texts[b])
        return [t for span in found for t in chat.tokens_of_span(span, encoding.offsets[b])]

    def _fault(self, encoding: Encoding, b: int, answer: list[int]) -> str | None:
        """Why row ``b`` cannot be used within ``max_length``; None if it can."""
        limit = self.encoder.max_length
        if not answer:
            return "no answer: its text has no token"
        if limit is None:
            return None
        image_positions = self._is_image(encoding.inputs["input_ids"][b]).nonzero()
        if len(image_positions) and int(image_positions[-1]) >= limit:
            last = int(image_positions[-1]) + 1
            return f"too long: image tokens up to {last}, the limit is {limit}{_FEWER}"
        if answer[0] >= limit:
            return f"too long: the first answer begins at token {answer[0] + 1}, the limit is {limit}"
        return None

    def _assemble(
        self, rows: list[RenderedSample], encoding: Encoding, answers: list[list[int]], rejected: list[Rejection]
    ) -> Batch:
        """The batch of encoded rows, truncated to ``max_length``."""
        lengths = encoding.inputs["attention_mask"].sum(1).tolist()
        limit = self.encoder.max_length or max(lengths)
        for row, length in zip(rows, lengths, strict=True):
            if length > limit:
                rejected.append(Rejection(row.sample.origin, f"cut: {length} tokens, the limit is {limit}", "cut"))
        inputs = _truncate(encoding.inputs, min(limit, max(lengths)))
        ids_BL = inputs["input_ids"]
        regions_BL = torch.full(ids_BL.shape, TokenRegion.PROMPT, dtype=torch.uint8)
        regions_BL[self._is_image(ids_BL)] = TokenRegion.IMAGE
        regions_BL[inputs["attention_mask"] == 0] = TokenRegion.PAD
        for b, answer in enumerate(answers):
            regions_BL[b, [t for t in answer if t < limit]] = TokenRegion.ANSWER
        # Token t is predicted at t - 1; an answer is never at 0, since a question precedes it.
        answered = (regions_BL == TokenRegion.ANSWER).flatten().nonzero().squeeze(1)
        samples = tuple(row.sample for row in rows)
        return Batch(inputs, regions_BL, answered - 1, ids_BL.flatten()[answered], samples)

    def _is_image(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self.encoder.processing.image_token_ids))


class PromptCollator:
    """Makes batches of questions for generation.

    Args:
        processing: The model's processor.
        max_length: Limit on the tokens of a question; a longer one is rejected, never truncated. None sets no limit.
        max_megapixels: Limit on the size of an image, in megapixels.
        blank_images: Whether each image is replaced by a gray one of its size: the baseline without image content.
        options: Further arguments of ``SampleEncoder``: max_images, video_frames, special_tokens.
    """

    def __init__(
        self,
        processing: ModelProcessor,
        max_length: int | None = None,
        *,
        max_megapixels: float = 40.0,
        blank_images: bool = False,
        **options: Any,
    ) -> None:
        self._encoder = SampleEncoder(processing, max_length, max_megapixels, **options)
        self._blank_images = blank_images

    def __call__(self, questions: Sequence[tuple[Sample, int]]) -> PromptBatch:
        """A batch of the questions that can be used; it may have no row and then no inputs."""
        rejected: list[Rejection] = []
        rows = [row for sample, turn in questions if (row := self._row(sample, turn, rejected))]
        rows, encoding = self._encoder.encode(rows, "left", rejected)
        limit = self._encoder.max_length
        if encoding is not None and limit is not None:
            lengths = encoding.inputs["attention_mask"].sum(1).tolist()
            if max(lengths) > limit:
                rejected += [
                    _too_long(row, length, limit) for row, length in zip(rows, lengths, strict=True) if length > limit
                ]
                rows = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
                rows, encoding = self._encoder.encode(rows, "left", rejected)
        return PromptBatch(
            encoding.inputs if encoding else {},
            tuple(row.sample for row in rows),
            tuple(row.turn for row in rows),
            tuple(rejected),
        )

    def _row(self, sample: Sample, turn: int, rejected: list[Rejection]) -> RenderedSample | None:
        try:
            row = self._encoder.row(sample, turn, rejected, to_generate=True)
        except (ChatError, pictures.BadImage) as error:
            rejected.append(Rejection(sample.origin, str(error)))
            return None
        return replace(row, images=[gray_image(image.size) for image in row.images]) if self._blank_images else row


def _too_long(row: RenderedSample, length: int, limit: int) -> Rejection:
    reason = f"too long: a question of {length} tokens, the limit is {limit}"
    return Rejection(row.sample.origin, reason + (_FEWER if row.images else ""))


def _truncate(inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """The first ``length`` positions of every tensor with one entry per token; image tensors are unchanged.

    Per token are masks and type ids (B, L), and cross-attention masks (B, L, images, tiles).
    """
    shape_BL = inputs["input_ids"].shape

    def per_token(name: str, value: Tensor) -> bool:
        return value.shape[:2] == shape_BL and (value.dim() == 2 or name == "cross_attention_mask")

    return {name: value[:, :length] if per_token(name, value) else value for name, value in inputs.items()}
