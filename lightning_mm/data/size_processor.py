"""The model's processor for rows whose pictures nobody opens: their tokens from the sizes of pictures alone.

A processor writes a text in place of each picture before it tokenizes, and that text depends on the picture's size. It
is asked once for each size, with a blank picture, and its answer is put into the text of every row. Where it does
otherwise, ``prove`` finds that out on rows of the run, and from then on blank pictures go through the processor itself.

Data flow: rendered texts and images, of which only the sizes are used -> text of each picture -> tokenizer ->
``Encoding`` without pixels -> ``row_meter``.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.processes import run_in_processes
from lightning_mm.data import token_lengths
from lightning_mm.data.chat import ChatRenderer
from lightning_mm.data.sample import IMAGE_MARK, Turn
from lightning_mm.data.sample_encoder import ENCODE_ERRORS, gray_image
from lightning_mm.data.token_lengths import Size, representative_sizes
from lightning_mm.models.encoding import Encoding
from lightning_mm.models.processor import ModelProcessor

_PROVED_GROUPS, _MOST_GROUPS = 8, 1024


class SizeProcessor(ModelProcessor):
    """A processor whose ``encode`` looks at no pixel.

    Args:
        processing: The model's processor.
        sizes: Width and height of all pictures that will come.

    Attributes:
        is_exact: Whether a picture has as many tokens as at its own size; if not, sizes within 5 % are measured as one.
    """

    def __init__(self, processing: ModelProcessor, sizes: set[Size]) -> None:
        super().__init__(processing.processor, processing.config)
        self._processing = processing
        chat = ChatRenderer(processing)
        self._placeholder = chat.placeholder
        self._questions = [chat.render_unmarked((Turn("user", f"{IMAGE_MARK * n}\nLorem ipsum"),)) for n in (1, 2)]
        self._expansions: dict[tuple[Size, bool], str | Exception] = {}
        self._is_proved = True
        groups = {size: size for size in sizes} if len(sizes) <= token_lengths.MAX_SIZES else self._equal_sizes(sizes)
        self.is_exact = groups is not None
        self._measured_as = representative_sizes(sizes) if groups is None else groups

    def encode(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], padding_side: Literal["left", "right"]
    ) -> Encoding:
        """Token ids and offsets as of the model's processor, whose exceptions are not caught.

        Args:
            texts: Rendered conversations.
            images: The images of each conversation, of which only the sizes are used.
            padding_side: 'right' to train, 'left' to generate.
        """
        if not self._is_proved:
            return self._processing.encode(texts, images, padding_side)
        expanded = [
            self._expanded(text, [image.size for image in row]) for text, row in zip(texts, images, strict=True)
        ]
        options = {"padding": True, "padding_side": padding_side, "truncation": False}
        options["verbose"] = False  # of a row beyond the tokenizer's own limit, which is told otherwise
        recorder = self._recording.tokenizer
        encoding = recorder(expanded, add_special_tokens=self._adds_special(texts[0]), **options)
        inputs = {name: torch.from_numpy(np.array(encoding[name])) for name in ("input_ids", "attention_mask")}
        return Encoding(inputs, recorder.texts, recorder.offsets)

    def measure(self, sizes: Mapping[bool, set[Size]], num_workers: int) -> None:
        """Ask the processor for the text of all pictures now, so that processes that are forked later know it.

        Args:
            sizes: Width and height of pictures, of those that stand alone in their row (False) and of others (True).
            num_workers: Processes that ask; 0 and 1 ask in this one.
        """
        asked = {(self._measured_as.get(size, size), beside) for beside, each in sizes.items() for size in each}
        jobs = sorted(asked - self._expansions.keys())
        found = run_in_processes(self._ask, jobs, num_workers, "measuring pictures")
        self._expansions.update(zip(jobs, found, strict=True))

    def prove(self, text: str, sizes: Sequence[Size]) -> None:
        """Compare the tokens of a row with those of the model's processor, which is used for all where they differ.

        Args:
            text: Rendered conversation.
            sizes: Width and height of its pictures.
        """
        blanks = [gray_image(self._measured_as.get(size, size)) for size in sizes]
        try:
            expected = self._processing.encode([text], [blanks], "right")
        except ENCODE_ERRORS:
            return
        try:
            found = self.encode([text], [blanks], "right")
            same_ids = torch.equal(found.inputs["input_ids"], expected.inputs["input_ids"])
            self._is_proved &= same_ids and found.texts == expected.texts
        except ENCODE_ERRORS:
            self._is_proved = False
        if not self._is_proved:
            reason = "the processor writes more of a picture than its size says"
            log_decision("data.lengths", "blank pictures through the processor, which is slow", reason)

    def _equal_sizes(self, sizes: set[Size]) -> dict[Size, Size] | None:
        """Size -> one with as many tokens, by what the processor says of itself; None where that proves wrong."""
        listed = sorted(sizes, key=lambda size: (size[0] * size[1], size))
        counts = self._processing.image_token_counts(listed)
        if counts is None:
            return None
        groups: dict[int, list[Size]] = {}
        for size, count in zip(listed, counts, strict=True):
            groups.setdefault(count, []).append(size)
        several = [group for group in groups.values() if len(group) > 1]
        proved = several[:: max(1, len(several) // _PROVED_GROUPS)]
        if len(groups) > _MOST_GROUPS or not all(self._equal(group[0], group[-1]) for group in proved):
            return None
        return {size: group[0] for group in groups.values() for size in group}

    def _equal(self, one: Size, other: Size) -> bool:
        """Whether the processor makes as many tokens of a picture of either size."""
        written = [self._ask(size, False) for size in (one, other)]
        if any(isinstance(text, Exception) for text in written):
            return False
        first, second = self._processing.num_tokens([str(text) for text in written])
        return first == second

    def _expanded(self, text: str, sizes: Sequence[Size]) -> str:
        pieces = text.split(self._placeholder)
        assert len(pieces) == len(sizes) + 1, "the renderer writes one placeholder per picture"
        written = [self._expansion(self._measured_as.get(size, size), len(sizes) > 1) for size in sizes]
        return pieces[0] + "".join(picture + piece for picture, piece in zip(written, pieces[1:], strict=True))

    def _expansion(self, size: Size, has_others: bool) -> str:
        if (size, has_others) not in self._expansions:
            self._expansions[size, has_others] = self._ask(size, has_others)
        found = self._expansions[size, has_others]
        if isinstance(found, Exception):
            raise found
        return found

    def _ask(self, size: Size, has_others: bool) -> str | Exception:
        """What the processor writes for a picture; its exception where it refuses one of this size."""
        question, count = self._questions[has_others], 2 if has_others else 1
        try:
            text = self._processing.encode([question], [[gray_image(size)] * count], "right").texts[0]
        except ENCODE_ERRORS as error:
            return error
        head, *between, tail = question.split(self._placeholder)
        written = text[len(head) : len(text) - len(tail)]
        middle = between[0] if between else ""
        each = written[: (len(written) - len(middle)) // count] if has_others else written
        is_whole = head + middle.join([each] * count) + tail == text
        return each if is_whole else ValueError("the processor changes more than the placeholder of a picture")
