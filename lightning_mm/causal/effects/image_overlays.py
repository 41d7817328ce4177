"""Numbers and words of image tokens, laid over the picture: entries of pictures.json.

Data flow: ``Asked`` -> ``Grids`` of the model's processor -> ``PictureGrid`` (where each token's patch is) -> one
number per token from ``attention``, words from ``lenses`` -> rows and columns.

Shapes: T image tokens of one picture, of which R * C lie in a grid of R rows and C columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_mm.causal.effects.attention_flow import contribution_norms
from lightning_mm.causal.effects.attention_knockout import edge
from lightning_mm.causal.interventions.activation_cache import Recording
from lightning_mm.causal.questions.image_regions import grids_of
from lightning_mm.causal.questions.question import Asked
from lightning_mm.core.decisions import decide
from lightning_mm.core.errors import UserError
from lightning_mm.data import images
from lightning_mm.data.probe_sets.build.patch_grids import NO_GRID, NO_OBJECT_SITES
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.processor import Processing


@dataclass(frozen=True)
class PictureGrid:
    """Where the tokens of a picture lie.

    Args:
        rows: R.
        columns: C.
        before: Tokens that stand in front of the grid and show no place (a class token).
        window: Left, top, right and bottom of what the grid shows, in the picture's pixels; beyond it where the picture
            was padded; None where that is not known.
    """

    rows: int
    columns: int
    before: int
    window: tuple[float, float, float, float] | None

    def laid_out(self, of_tokens: Sequence[Any]) -> list[list[Any]]:
        """R rows of C of what there is of every token (T)."""
        rest = list(of_tokens)[self.before :]
        assert len(rest) == self.rows * self.columns, "one for every image token"
        return [rest[row * self.columns : (row + 1) * self.columns] for row in range(self.rows)]


class PictureGrids:
    """Finds out how a model's image tokens lie in pictures.

    Args:
        processing: The model's processor.
        max_megapixels: Largest picture that is decoded.
    """

    def __init__(self, processing: Processing, max_megapixels: float = 40.0) -> None:
        self._grids, self._max_megapixels = grids_of(processing), max_megapixels

    def grid(self, asked: Asked) -> PictureGrid:
        """The grid of a question's picture.

        Raises:
            UserError: There is not one picture, or its tokens are known to lie in no grid, or nothing is known of them
                and their number is no square.
        """
        thw, number = asked.inputs.get("image_grid_thw"), len(asked.image)
        if len(asked.question.images) != 1 or number == 0:
            raise _no_map(asked, f"it has {len(asked.question.images)} pictures and {number} image tokens")
        found = self._grids.layout(self._size(asked), number, None if thw is None else thw[0].cpu())
        if not isinstance(found, str):
            window, rows, columns = found
            ends = (window.left, window.top, window.right, window.bottom)
            return PictureGrid(rows, columns, number - rows * columns, ends)
        side = math.isqrt(number)
        if found != NO_GRID or thw is not None or side * side != number or side == 1:
            raise _no_map(asked, found.removeprefix(f"{NO_OBJECT_SITES}: "))
        decide("causal.picture_grid", f"{side} x {side}", "the processor tells no grid; this is the number of tokens")
        return PictureGrid(side, side, 0, None)

    def _size(self, asked: Asked) -> tuple[int, int]:
        return images.load(asked.question.images[0], self._max_megapixels).image.size


def image_map(
    mm: MultimodalModel,
    recording: Recording,
    asked: Asked,
    grid: PictureGrid,
    layer: int,
    to: str = "constraint",
) -> dict[str, Any]:
    """How much each part of the picture gives to a class of tokens, as an entry of pictures.json without ``image``.

    A token's weight is the norm of its contribution (``contribution_norms``), the mean over the tokens it goes to.

    Args:
        mm: The plain model.
        recording: The question's run.
        asked: The question.
        grid: Of its picture.
        layer: Decoder block.
        to: Who is given to: ``constraint``, ``question`` or ``last``.

    Raises:
        UserError: The question has no such tokens, or the layer attends to other states than the tokens'.
    """
    way = edge(asked, f"image->{to}")
    if not way:
        raise _no_map(asked, f"it has no {way.name}")
    norms = contribution_norms(mm, recording, layer, way.targets)
    if norms.tokens.shape[1] != recording.length:
        raise _no_map(asked, f"layer {layer} does not attend to the picture's tokens but to the vision tower's states")
    weight_T = norms.tokens[:, way.sources.to(norms.tokens.device)].mean(0)
    return entry(asked, grid, f"contribution to the {to}, layer {layer}", layer, weight_T)


def entry(asked: Asked, grid: PictureGrid, what: str, layer: int, weight_T: Tensor) -> dict[str, Any]:
    """One number per image token as an entry of pictures.json, without ``image``, the file's name."""
    return {
        "id": asked.question.id,
        "text": asked.question.text,
        "what": what,
        "layer": layer,
        "grid": [grid.rows, grid.columns],
        "window": None if grid.window is None else list(grid.window),
        "weights": grid.laid_out(weight_T.tolist()),
    }


def _no_map(asked: Asked, why: str) -> UserError:
    return UserError(
        f"Nothing can be laid over the picture of question {asked.question.id}.",
        f"{why[0].upper()}{why[1:]}.",
        "Ask about one picture, and use a model whose image tokens are patches of it; curves by layer need no grid.",
    )
