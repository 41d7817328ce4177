"""Image overlays: values and words of image tokens by patch, as entries of pictures.json.

Data flow: ``EncodedQuestion`` -> patch layout of the model's processor -> ``PictureGrid`` -> one value per token
(``attention_flow``) or word (``logit_lens``) -> rows and columns.

Shapes: T image tokens of one image, of which R * C form a grid of R rows and C columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_mm.causal.effects.attention_flow import contribution_norms
from lightning_mm.causal.effects.attention_knockout import attention_edge
from lightning_mm.causal.interventions.activation_cache import ActivationCache
from lightning_mm.causal.questions.image_regions import patch_grids
from lightning_mm.causal.questions.question import EncodedQuestion
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data import images
from lightning_mm.data.probe_sets.build.patch_grids import NO_GRID, NO_OBJECT_SITES
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.processor import Processing


@dataclass(frozen=True)
class PictureGrid:
    """Grid of the patches that the tokens of an image show.

    Args:
        rows: R, number of rows.
        columns: C, number of columns.
        before: Number of tokens before the grid that show no patch (a class token).
        window: Left, top, right and bottom of the area that the grid covers, in pixels of the image; exceeds the image
            if it was padded; None: not known.
    """

    rows: int
    columns: int
    before: int
    window: tuple[float, float, float, float] | None

    def laid_out(self, of_tokens: Sequence[Any]) -> list[list[Any]]:
        """(T) values of the image tokens as R rows of C values."""
        rest = list(of_tokens)[self.before :]
        assert len(rest) == self.rows * self.columns, "one value for every image token"
        return [rest[row * self.columns : (row + 1) * self.columns] for row in range(self.rows)]


class PictureGrids:
    """Finds the grids of a model's image tokens.

    Args:
        processing: The model's processor.
        max_megapixels: Larger images are rejected, in millions of pixels.
    """

    def __init__(self, processing: Processing, max_megapixels: float = 40.0) -> None:
        self._grids, self._max_megapixels = patch_grids(processing), max_megapixels

    def grid(self, encoded: EncodedQuestion) -> PictureGrid:
        """The grid of a question's image.

        Raises:
            UserError: The question does not have exactly one image, its tokens do not form a grid, or their layout is
                not known and their number is not a square.
        """
        thw, number = encoded.inputs.get("image_grid_thw"), len(encoded.image)
        if len(encoded.question.images) != 1 or number == 0:
            raise _no_map(encoded, f"it has {len(encoded.question.images)} pictures and {number} image tokens")
        size = images.load(encoded.question.images[0], self._max_megapixels).image.size
        layout = self._grids.layout(size, number, None if thw is None else thw[0].cpu())
        if not isinstance(layout, str):
            window, rows, columns = layout
            ends = (window.left, window.top, window.right, window.bottom)
            return PictureGrid(rows, columns, number - rows * columns, ends)
        side = math.isqrt(number)
        if layout != NO_GRID or thw is not None or side * side != number or side == 1:
            raise _no_map(encoded, layout.removeprefix(f"{NO_OBJECT_SITES}: "))
        log_decision(
            "causal.picture_grid", f"{side} x {side}", "the processor tells no grid; this is the number of tokens"
        )
        return PictureGrid(side, side, 0, None)


def contribution_map(
    mm: MultimodalModel,
    cache: ActivationCache,
    encoded: EncodedQuestion,
    grid: PictureGrid,
    layer: int,
    to: str = "constraint",
) -> dict[str, Any]:
    """Contribution of each image patch to a class of tokens, as an entry of pictures.json without ``image``.

    The weight of an image token is the norm of its contribution (``contribution_norms``), averaged over the tokens that
    attend to it.

    Args:
        mm: The unwrapped model.
        cache: Activations of the question.
        encoded: The question.
        grid: Grid of its image.
        layer: Index of the decoder block.
        to: Class of the tokens that attend: ``constraint``, ``question`` or ``last``.

    Raises:
        UserError: The question has no such tokens, or the layer is a cross-attention layer.
    """
    edge = attention_edge(encoded, f"image->{to}")
    if not edge:
        raise _no_map(encoded, f"it has no {edge.name}")
    norms = contribution_norms(mm, cache, layer, edge.targets)
    if norms.tokens.shape[1] != cache.length:
        raise _no_map(
            encoded, f"layer {layer} does not attend to the picture's tokens but to the vision tower's states"
        )
    weight_T = norms.tokens[:, edge.sources.to(norms.tokens.device)].mean(0)
    return overlay_entry(encoded, grid, f"contribution to the {to}, layer {layer}", layer, weight_T)


def overlay_entry(
    encoded: EncodedQuestion, grid: PictureGrid, what: str, layer: int, weight_T: Tensor
) -> dict[str, Any]:
    """One weight per image token, and its title, as an entry of pictures.json without ``image``, the file name."""
    return {
        "id": encoded.question.id,
        "text": encoded.question.text,
        "what": what,
        "layer": layer,
        "grid": [grid.rows, grid.columns],
        "window": None if grid.window is None else list(grid.window),
        "weights": grid.laid_out(weight_T.tolist()),
    }


def _no_map(encoded: EncodedQuestion, why: str) -> UserError:
    return UserError(
        f"Nothing can be laid over the picture of question {encoded.question.id}.",
        f"{why[0].upper()}{why[1:]}.",
        "Ask about one picture, and use a model whose image tokens are patches of it; curves by layer need no grid.",
    )
