"""One call of the processor for a batch: decoded images, frames of videos, and the text of the chat template.

A video is given to the model as its frames, an image each in place of the mark. That is what a model without a
processor for videos can take, and the same with and without torchvision, which transformers' own need.

Data flow: Sample -> ``SampleEncoder.row`` (text by ``chat``, pixels by ``images`` and ``videos``) -> ``RenderedSample``
-> ``SampleEncoder.encode`` -> ``Encoding`` -> ``collator``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from PIL import Image

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data import images as pictures
from lightning_mm.data import videos
from lightning_mm.data.chat import ChatError, ChatRenderer, Rendered
from lightning_mm.data.sample import IMAGE_MARK, VIDEO_MARK, Rejection, Sample, Turn
from lightning_mm.models.encoding import Encoding
from lightning_mm.models.processor import ModelProcessor

Side = Literal["left", "right"]
# What image processors raise on an image that they cannot process.
ENCODE_ERRORS = (ValueError, RuntimeError, LookupError, ArithmeticError, TypeError, OSError)
_MARKS = re.compile(f"{IMAGE_MARK}|{VIDEO_MARK}")
_GRAY = (127, 127, 127)
ANIMATED = "animated image"
"""Begins the reason why a row is used in part that only its decoded images show."""


@dataclass(frozen=True)
class RenderedSample:
    """One sample, ready for the processor.

    Args:
        sample: The conversation.
        images: Its decoded images, and the frames of its videos where these stand.
        rendered: Its text by the chat template.
        turn: Index of the turn to be generated, in prompts; -1 otherwise.
    """

    sample: Sample
    images: list[Image.Image]
    rendered: Rendered
    turn: int = -1


class SampleEncoder:
    """Decodes images and calls the processor; used by every collator.

    Args:
        processing: The model's processor.
        max_length: Limit on the tokens of a row; None sets none.
        max_megapixels: Limit on the size of an image, in megapixels.
        max_images: Limit on the images of a row, frames not counted; None sets none.
        video_frames: Frames per video; a shorter video gives all that it has.
        special_tokens: Special tokens that texts may contain nevertheless; () for none.
    """

    def __init__(
        self,
        processing: ModelProcessor,
        max_length: int | None,
        max_megapixels: float,
        *,
        max_images: int | None = None,
        video_frames: int = 8,
        special_tokens: Sequence[str] = (),
    ) -> None:
        self.processing, self.max_length, self.max_megapixels = processing, max_length, max_megapixels
        self.max_images, self.video_frames = max_images, video_frames
        self.chat = ChatRenderer(processing, special_tokens)

    def row(
        self,
        sample: Sample,
        num_turns: int,
        rejected: list[Rejection],
        *,
        to_generate: bool = False,
        blank_images: bool = False,
    ) -> RenderedSample:
        """A sample's first turns as text, with their images.

        Args:
            sample: The conversation.
            num_turns: Number of turns, from the first on.
            rejected: A note on animated images is added to it.
            to_generate: Whether the text ends with the generation prompt.
            blank_images: Whether each image is replaced by a gray one of its size, without decoding it.

        Raises:
            ChatError: The conversation cannot be rendered, or has marks or images that cannot be used.
            BadImage: An image or video cannot be used.
        """
        turns = sample.turns[:num_turns]
        marks = [mark for turn in turns if turn.role == "user" for mark in _MARKS.findall(turn.text)]
        self._check_marks(sample, marks, is_whole=num_turns == len(sample.turns))
        clips = [
            videos.load(video, self.video_frames, self.max_megapixels)
            for video in sample.videos[: marks.count(VIDEO_MARK)]
        ]
        turns = with_frames(turns, [len(clip) for clip in clips])
        rendered = self.chat.render(turns, to_generate, sample.tools)
        num_images = marks.count(IMAGE_MARK)
        if blank_images:
            known = sample.sizes or [pictures.check_header(path, self.max_megapixels) for path in sample.images]
            loaded = [gray_image(size) for size in known[:num_images]]
            clips = [[gray_image(frame.size) for frame in clip] for clip in clips]
        else:
            loaded = self.images(sample, num_images, rejected)
        if clips:
            rest, frames = iter(loaded), iter(clips)
            loaded = [image for mark in marks for image in (next(frames) if mark == VIDEO_MARK else [next(rest)])]
        return RenderedSample(sample, loaded, rendered, num_turns if to_generate else -1)

    def _check_marks(self, sample: Sample, marks: list[str], is_whole: bool) -> None:
        if self.max_images is not None and len(sample.images) > self.max_images:
            raise ChatError(f"too many images: the row has {len(sample.images)}, data.max_images is {self.max_images}")
        for mark, given in ((IMAGE_MARK, sample.images), (VIDEO_MARK, sample.videos)):
            count = marks.count(mark)
            if count > len(given) or (is_whole and count < len(given)):
                raise ChatError(f"marks and files differ: {count} {mark} marks for {len(given)}")
        if VIDEO_MARK in marks and not self.takes_several_images:
            raise ChatError("video: this model takes none")

    @cached_property
    def takes_several_images(self) -> bool:
        """Whether frames of a video can be given to the model; said once."""
        try:
            text = self.chat.render((Turn("user", f"{IMAGE_MARK * 2}\n?"),), True).text
            self.processing.encode([text], [[gray_image((64, 64))] * 2], "right")
        except (ChatError, *ENCODE_ERRORS):
            return False
        log_decision("data.videos", f"up to {self.video_frames} frames each", "given as images, evenly spaced in time")
        return True

    def images(self, sample: Sample, num_images: int, rejected: list[Rejection]) -> list[Image.Image]:
        """The decoded images of a sample.

        Args:
            sample: The conversation.
            num_images: Number of images to decode, from the first on.
            rejected: A note on animated images is added to it.
        """
        loaded = [pictures.load(path, self.max_megapixels) for path in sample.images[:num_images]]
        if any(picture.is_animated for picture in loaded):
            rejected.append(Rejection(sample.origin, f"{ANIMATED}: its first frame is used", "cut"))
        return [picture.image for picture in loaded]

    def encode(
        self, rows: list[RenderedSample], side: Side, rejected: list[Rejection]
    ) -> tuple[list[RenderedSample], Encoding | None]:
        """The rows that the processor accepts, and their encoding (None where it accepts none).

        All rows are encoded in one call; if the processor raises, those that it accepts one by one.

        Args:
            rows: Samples to encode.
            side: Side of the padding.
            rejected: Samples that the processor refuses are added to it.
        """
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

    def _call(self, rows: list[RenderedSample], side: Side) -> Encoding:
        return self.processing.encode([row.rendered.text for row in rows], [row.images for row in rows], side)


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]


def gray_image(size: tuple[int, int]) -> Image.Image:
    """A gray image: what stands in for a picture that is not to be seen.

    Args:
        size: Width and height in pixels.
    """
    return Image.new("RGB", size, _GRAY)


def with_frames(turns: Sequence[Turn], num_frames: Sequence[int]) -> tuple[Turn, ...]:
    """The turns with image marks in place of each video mark, as many as the video has frames.

    Args:
        turns: Messages with video marks.
        num_frames: Frames of each video, in order; further marks are left.
    """
    counts = iter(num_frames)

    def frames(turn: Turn) -> Turn:
        if turn.role != "user" or VIDEO_MARK not in turn.text:
            return turn
        return replace(turn, text=re.sub(VIDEO_MARK, lambda _: IMAGE_MARK * next(counts, 0) or VIDEO_MARK, turn.text))

    return tuple(map(frames, turns))
