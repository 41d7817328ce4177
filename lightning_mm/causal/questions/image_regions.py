"""Visual constraints: boxes in an image that determine the answer, as image tokens or greyed out.

Data flow: boxes of a ``Question`` -> ``BoxTokens``: the image tokens that show them; or -> ``grey_out_boxes``: the
image without them -> ``encode_image``: its processor inputs -> ``corruption``.

Shapes: L tokens, P positions.
"""

from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_mm.causal.questions.question import EncodedQuestion, Question
from lightning_mm.data import images
from lightning_mm.data.chat import ChatRenderer
from lightning_mm.data.probe_sets.build.patch_grids import PatchGrids
from lightning_mm.data.probe_sets.collator import GRAY
from lightning_mm.data.sample import IMAGE_MARK, Rejection, Turn
from lightning_mm.models.processor import Processing


def encode_image(processing: Processing, picture: Image.Image) -> Mapping[str, Tensor]:
    """Processor inputs of one image with a minimal text: one row."""
    text = ChatRenderer(processing).render([Turn("user", f"{IMAGE_MARK}\n?")], add_generation_prompt=True).text
    return processing.encode([text], [[picture]], "right").inputs


def patch_grids(processing: Processing) -> PatchGrids:
    """The layout of the model's image tokens in images, from its processor."""
    merge_size = int(getattr(processing.processor.image_processor, "merge_size", 1))
    return PatchGrids(lambda picture: encode_image(processing, picture), processing.config.to_dict(), merge_size)


def grey_out_boxes(question: Question) -> Image.Image | Rejection:
    """A question's image with its boxes filled with grey; a ``Rejection`` if it has no usable boxes."""
    picture = _load_picture(question)
    if isinstance(picture, Rejection):
        return picture
    drawing = ImageDraw.Draw(picture)
    for each in question.boxes:
        left, top, right, bottom = map(round, each.box)
        drawing.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=GRAY)
    return picture


class BoxTokens:
    """Finds the image tokens whose patches overlap a question's boxes.

    Args:
        processing: The model's processor.
    """

    def __init__(self, processing: Processing) -> None:
        self._grids = patch_grids(processing)

    def __call__(self, encoded: EncodedQuestion) -> Tensor | Rejection:
        """(P,) positions of the image tokens that show any part of the boxes; a ``Rejection`` if they are not known."""
        question = encoded.question
        picture = _load_picture(question)
        if isinstance(picture, Rejection):
            return picture
        shown = torch.zeros(len(encoded.image), dtype=torch.bool)
        thw = encoded.inputs.get("image_grid_thw")
        for each in question.boxes:
            weights = self._grids.weights(
                each.box, picture.size, len(encoded.image), None if thw is None else thw[0].cpu()
            )
            if isinstance(weights, str):
                return Rejection(question.id, weights)
            shown |= weights > 0
        return (
            encoded.image[shown] if shown.any() else Rejection(question.id, "boxes cropped away: no token shows them")
        )


def _load_picture(question: Question) -> Image.Image | Rejection:
    """The image that the boxes refer to; a ``Rejection`` if they cannot be placed."""
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
