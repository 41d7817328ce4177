"""Visual constraints: the things in the picture that an answer hangs on, as tokens of the picture, or taken away.

Data flow: boxes of a Question -> ``BoxTokens``: which of the picture's tokens show them (``grids``), or ``greyed``: the
picture without them -> ``encoded``: that picture as the model takes it -> ``corruption``.

Shapes: L tokens, P positions.
"""

from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_mm.causal.questions.question import Asked, Question
from lightning_mm.data import images
from lightning_mm.data.chat import ChatRenderer
from lightning_mm.data.probe_sets.build.patch_grids import PatchGrids
from lightning_mm.data.probe_sets.collator import GRAY
from lightning_mm.data.sample import IMAGE_MARK, Rejection, Turn
from lightning_mm.models.processor import Processing


def encoded(processing: Processing, picture: Image.Image) -> Mapping[str, Tensor]:
    """A picture through the model's processor, with next to no text: one row."""
    text = ChatRenderer(processing).render([Turn("user", f"{IMAGE_MARK}\n?")], add_generation_prompt=True).text
    return processing.encode([text], [[picture]], "right").inputs


def grids_of(processing: Processing) -> PatchGrids:
    """How the model's image tokens lie in pictures."""
    merge_size = int(getattr(processing.processor.image_processor, "merge_size", 1))
    return PatchGrids(lambda picture: encoded(processing, picture), processing.config.to_dict(), merge_size)


def greyed(question: Question) -> Image.Image | Rejection:
    """Its picture with grey in place of its boxes, or why it has none."""
    picture = _pictured(question)
    if isinstance(picture, Rejection):
        return picture
    drawing = ImageDraw.Draw(picture)
    for each in question.boxes:
        left, top, right, bottom = map(round, each.box)
        drawing.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=GRAY)
    return picture


class BoxTokens:
    """Finds the tokens that show what boxes hold.

    Args:
        processing: The model's processor.
    """

    def __init__(self, processing: Processing) -> None:
        self._grids = grids_of(processing)

    def __call__(self, asked: Asked) -> Tensor | Rejection:
        """(P,) positions of the picture's tokens that show any part of the question's boxes, or why none is known."""
        question = asked.question
        picture = _pictured(question)
        if isinstance(picture, Rejection):
            return picture
        shown = torch.zeros(len(asked.image), dtype=torch.bool)
        thw = asked.inputs.get("image_grid_thw")
        for each in question.boxes:
            weights = self._grids.weights(
                each.box, picture.size, len(asked.image), None if thw is None else thw[0].cpu()
            )
            if isinstance(weights, str):
                return Rejection(question.id, weights)
            shown |= weights > 0
        return asked.image[shown] if shown.any() else Rejection(question.id, "boxes cropped away: no token shows them")


def _pictured(question: Question) -> Image.Image | Rejection:
    """The one picture that the boxes are of, or why they cannot be placed."""
    why = "no boxes: the question has no visual constraint" if not question.boxes else ""
    if not why and len(question.images) != 1:
        why = f"boxes of one picture: the question has {len(question.images)}"
    if why:
        return Rejection(question.id, why)
    try:
        picture = images.load(question.images[0])
    except images.BadImage as error:
        return Rejection(question.id, str(error))
    if picture.is_turned:
        return Rejection(question.id, "boxes not used: EXIF turns the picture, and they speak of it as stored")
    width, height = picture.image.size
    for name, (left, top, right, bottom) in ((each.name, each.box) for each in question.boxes):
        if left >= width or top >= height or right <= 0 or bottom <= 0:
            return Rejection(question.id, f"box outside the picture: {name!r} in {width} x {height} pixels")
    return picture.image
