"""The micro-batches that a plan counts on: those of the run's data, or rows of given lengths.

Data flow: data module -> its first batches; or lengths in tokens -> a picture (``picture_size``) and words -> the
model's own processor, with the run's bounds on pixels -> a batch of equal rows.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch, TokenRegion
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.token_lengths import Size
from lightning_mm.models.loading import Backbone
from lightning_mm.models.processor import ModelProcessor, load_processor
from lightning_mm.verbs.picture_size import USUAL_SIDE, PictureSizes

_BATCHES = 8
_TEXT, _SUPERVISED = 64, 16


@dataclass(frozen=True, kw_only=True)
class RowLengths:
    """Lengths of rows, in tokens, in place of those of data; None where one is not given.

    Args:
        image_tokens: Of the picture; 0: rows without one. None: as many as one of 336 x 336 pixels has.
        text_tokens: Of the text, answers included. None: 64.
        supervised: Of the answers. None: 16.
    """

    image_tokens: int | None = None
    text_tokens: int | None = None
    supervised: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("image_tokens", 0), ("text_tokens", 1), ("supervised", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}.", f"It is {least} or more.", f"Give --{name} {least}.")

    @property
    def are_given(self) -> bool:
        """Whether any is."""
        return any(value is not None for value in (self.image_tokens, self.text_tokens, self.supervised))


def micro_batches(
    backbone: Backbone, data: MMDataModule | None, lengths: RowLengths, batch_size: int | None
) -> list[Batch]:
    """The run's first micro-batches, or one of the given lengths.

    Args:
        backbone: The model, whose processor makes them.
        data: The run's data; None, or without training data: rows of the given lengths, or of the usual ones.
        lengths: In place of those of the data.
        batch_size: Rows of a batch; None: as the data module has it, else 4.
    """
    own = MMDataModule() if data is None else copy.copy(data)
    if not lengths.are_given and own.paths["train"] is not None:
        own.trainer, own.num_workers = None, 0
        own.batch_size = own.batch_size if batch_size is None else batch_size
        if (own.processor, own.revision) != (backbone.path, backbone.revision):
            own.processor, own.revision = backbone.path, backbone.revision
            vars(own).pop("_own_processing", None)
        return list(islice(iter(own.train_dataloader()), _BATCHES))
    text, supervised = lengths.text_tokens or _TEXT, lengths.supervised or _SUPERVISED
    if not lengths.are_given:
        usual = f"a picture of 336 x 336, {text} text tokens, {supervised} of them supervised"
        log_decision("plan.lengths", usual, "neither data nor lengths of rows are given")
    processing = load_processor(backbone.path, backbone.revision)
    processing.bound_pixels(own.bounds)
    with TemporaryDirectory() as folder:
        maker = RowMaker(processing, batch_size or own.batch_size, Path(folder))
        return [maker.of(lengths.image_tokens, text, supervised)]


class RowMaker:
    """Makes batches of rows of given lengths with the model's own processor.

    Args:
        processing: The model's processor, with the bounds of the run.
        rows: Number of equal rows in a batch.
        folder: Folder that the rows are written to.
    """

    def __init__(self, processing: ModelProcessor, rows: int, folder: Path) -> None:
        self.processing, self.rows, self.folder = processing, rows, folder

    def of(self, image_tokens: int | None, text_tokens: int, supervised: int) -> Batch:
        """A batch of these lengths in tokens; models with a fixed image size keep their number of image tokens."""
        size = self._picture(image_tokens)
        words, answer = 8, 1
        for _ in range(3):
            held = mean_lengths([self._made(1, size, words, answer)])
            answer = max(1, answer + supervised - round(held["supervised"]))
            words = max(1, words + text_tokens - supervised - round(held["text_tokens"] - held["supervised"]))
        return self._made(self.rows, size, words, answer)

    def _picture(self, image_tokens: int | None) -> Size | None:
        """Size of the rows' picture; None for rows without one."""
        if image_tokens is None:
            return USUAL_SIDE, USUAL_SIDE
        if image_tokens == 0:
            return None
        sizes = PictureSizes(self.processing)
        size = sizes.nearest(image_tokens)
        if (found := sizes.num_tokens(size)) != image_tokens:
            log_decision("plan", f"{found} image tokens", f"the processor makes no picture of {image_tokens}")
        return size

    def _made(self, rows: int, size: Size | None, words: int, answer: int) -> Batch:
        row: dict[str, Any] = {"id": "row"}
        if size:
            Image.new("RGB", size, "grey").save(self.folder / "picture.png")
            row["image"] = "picture.png"
        mark = "<image>\n" if size else ""
        turns = (("human", mark + " a" * words), ("gpt", "a" + " a" * (answer - 1)))
        row["conversations"] = [{"from": who, "value": text} for who, text in turns]
        file = self.folder / "rows.json"
        file.write_text(json.dumps([row] * rows))
        bounds = self.processing.bounds
        data = MMDataModule(
            train=str(file),
            batch_size=rows,
            num_workers=0,
            processor=self.processing,
            max_length=None,
            min_pixels=bounds.min_pixels,
            max_pixels=bounds.max_pixels,
        )
        return next(iter(data.train_dataloader()))


def mean_lengths(batches: Sequence[Batch]) -> dict[str, float]:
    """Mean tokens per row by region, rows per micro-batch, and fractions that are padding or shared."""
    rows = sum(len(batch) for batch in batches)
    image = sum(int((batch.regions == TokenRegion.IMAGE).sum()) for batch in batches)
    tokens = sum(int((batch.regions != TokenRegion.PAD).sum()) for batch in batches)
    return {
        "rows": rows / len(batches),
        "image_tokens": image / rows,
        "text_tokens": (tokens - image) / rows,
        "supervised": sum(batch.num_supervised for batch in batches) / rows,
        "padding": 1 - tokens / sum(batch.regions.numel() for batch in batches),
        "shared": 1 - sum(len(batch.real) for batch in batches) / tokens,
    }
