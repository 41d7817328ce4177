"""What both collators share: pictures decoded, texts and pictures through the processor, and what it refuses set aside.

Data flow: ``collator`` makes Rows of samples -> ``Encoder.encode`` -> the rows that are left and their ``Encoding``.
"""

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from lightning_mm.data import images as pictures
from lightning_mm.data.chat import Chat, Rendered
from lightning_mm.data.sample import Rejection, Sample
from lightning_mm.errors import UserError
from lightning_mm.models.processing import Encoding, Processing

Side = Literal["left", "right"]
# What image processors raise on a picture they cannot take.
ENCODE_ERRORS = (ValueError, RuntimeError, LookupError, ArithmeticError, TypeError, OSError)


@dataclass(frozen=True)
class Row:
    """One sample, ready for the processor. ``turn`` is the one asked for, in prompts."""

    sample: Sample
    images: list[Image.Image]
    rendered: Rendered
    turn: int = -1


class Encoder:
    """What both collators share: decode, and encode what can be encoded."""

    def __init__(self, processing: Processing, max_length: int | None, max_megapixels: float) -> None:
        self.processing, self.max_length, self.max_megapixels = processing, max_length, max_megapixels
        self.chat = Chat(processing)

    def images(self, sample: Sample, num_images: int, rejected: list[Rejection]) -> list[Image.Image]:
        loaded = [pictures.load(path, self.max_megapixels) for path in sample.images[:num_images]]
        if any(picture.is_animated for picture in loaded):
            rejected.append(Rejection(sample.origin, "animated image: its first frame is used", "cut"))
        return [picture.image for picture in loaded]

    def encode(self, rows: list[Row], side: Side, rejected: list[Rejection]) -> tuple[list[Row], Encoding | None]:
        """All rows in one call; if the processor refuses, those it takes when they are alone."""
        if not rows:
            return [], None
        try:
            return rows, self._call(rows, side)
        except ENCODE_ERRORS as error:
            if len(rows) == 1:
                rejected.append(Rejection(rows[0].sample.origin, f"processor refuses: {_first_line(error)}"))
                return [], None
            good = [row for row in rows if self.encode([row], side, rejected)[0]]
            if len(good) < len(rows):
                return self.encode(good, side, rejected)
            raise UserError(
                "The model's processor takes these samples one by one but not together.",
                f"{_first_line(error)} ({', '.join(row.sample.origin for row in rows)})",
                "Set data.batch_size to 1.",
            ) from error

    def _call(self, rows: list[Row], side: Side) -> Encoding:
        return self.processing.encode([row.rendered.text for row in rows], [row.images for row in rows], side)


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
