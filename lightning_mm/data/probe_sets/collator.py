"""Probe rows into what the model takes, with the tokens that each site reads.

Data flow: list[ProbeRow] -> pictures decoded, or greyed; the turn written by the chat template, up to where an answer
would begin -> one call of the processor -> ``ProbeBatch``.

Sites of a row: ``last`` is its last token; ``image`` the picture's tokens; ``text`` the tokens of the row's span;
``token`` one of them, drawn by a hash of the row's id (of the picture's, or of the span's where there is no picture);
``object:i`` the tokens whose patches show the i-th box, each by how much of it.

Shapes: B rows, L tokens after padding, S sites: the most that a row of the batch has.

Batches of probe rows, dealt out to the ranks.

Data flow: the rows of a ``ProbeSet`` -> whole batches of rows of like length -> ``ProbeCollator`` -> ``taps``.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from lightning_mm.core.decisions import decide
from lightning_mm.core.distributed import rank_and_world_size
from lightning_mm.data import chat
from lightning_mm.data import images as pictures
from lightning_mm.data.chat import ChatError, Rendered
from lightning_mm.data.collator import RenderedSample, SampleEncoder
from lightning_mm.data.dataloader import CheckedDataLoader, evaluation_loader
from lightning_mm.data.probe_sets.build.patch_grids import NO_OBJECT_SITES, PatchGrids
from lightning_mm.data.probe_sets.files import ProbeRow
from lightning_mm.data.probe_sets.probe_set import ProbeBatch
from lightning_mm.data.sample import IMAGE_MARK, Rejection, Turn
from lightning_mm.models.processor import Encoding, Processing

GREY = (127, 127, 127)


class ProbeCollator:
    """Makes batches of probe rows.

    Args:
        processing: The model's processor.
        max_length: A longer row falls out; it is never cut.
        max_megapixels: Largest picture that is decoded.
    """

    def __init__(self, processing: Processing, max_length: int | None = None, *, max_megapixels: float = 40.0) -> None:
        self._encoder = SampleEncoder(processing, max_length, max_megapixels)
        merge_size = int(getattr(processing.processor.image_processor, "merge_size", 1))
        self._grids = PatchGrids(self._alone, processing.config.to_dict(), merge_size)

    def __call__(self, rows: Sequence[ProbeRow]) -> ProbeBatch:
        """Make a batch of what can be used; it has no row, and no inputs, if nothing can."""
        rejected: list[Rejection] = []
        by_id = {row.id: row for row in rows}
        ready = [made for row in rows if (made := self._ready(row, rejected))]
        ready, encoding = self._encoded(ready, rejected)
        if encoding is None:
            return ProbeBatch({}, torch.zeros(0, 0, 0), (), (), tuple(rejected))
        kept = tuple(by_id[made.sample.id] for made in ready)
        sites, picture = [], 0
        for b, (row, made) in enumerate(zip(kept, ready, strict=True)):
            sites.append(self._sites(row, made, encoding, b, picture, rejected))
            picture += len(made.images)
        weights_BSL = torch.zeros(len(kept), max(map(len, sites)), encoding.inputs["input_ids"].shape[1])
        for b, found in enumerate(sites):
            for s, weight_L in enumerate(found.values()):
                weights_BSL[b, s] = weight_L / weight_L.sum()
        return ProbeBatch(encoding.inputs, weights_BSL, tuple(map(tuple, sites)), kept, tuple(dict.fromkeys(rejected)))

    def say_what_is_missing(self, rows: Sequence[ProbeRow]) -> None:
        """Try the first row with boxes, and say so if the tokens of its objects cannot be told."""
        for row in [row for row in rows if row.boxes][:1]:
            for reason in dict.fromkeys(each.reason for each in self([row]).rejected):
                if reason.startswith(NO_OBJECT_SITES):
                    decide("data.probes.object_at_patches", "not read", reason)

    def _ready(self, row: ProbeRow, rejected: list[Rejection]) -> RenderedSample | None:
        try:
            rendered = self._rendered(row)
            images = self._encoder.images(row.sample, len(row.sample.images), rejected)
        except (ChatError, pictures.BadImage) as error:
            rejected.append(Rejection(row.sample.origin, str(error)))
            return None
        if row.blank:
            images = [Image.new("RGB", image.size, GREY) for image in images]
        return RenderedSample(replace(row.sample, id=row.id), images, rendered)

    def _rendered(self, row: ProbeRow) -> Rendered:
        """The turn as the template writes it, with the place of the row's span."""
        text = self._encoder.chat.render(row.sample.turns, add_generation_prompt=True).text
        said = next(piece for piece in row.text.split(IMAGE_MARK) if row.span in piece).strip()
        at = text.rfind(said)
        if at < 0:
            raise ChatError("template changes the question: it is not written as it was given")
        start = at + said.index(row.span)
        return Rendered(text, ((start, start + len(row.span)),))

    def _encoded(
        self, ready: list[RenderedSample], rejected: list[Rejection]
    ) -> tuple[list[RenderedSample], Encoding | None]:
        ready, encoding = self._encoder.encode(ready, "right", rejected)
        limit = self._encoder.max_length
        if encoding is None or limit is None:
            return ready, encoding
        lengths = encoding.inputs["attention_mask"].sum(1).tolist()
        if max(lengths) <= limit:
            return ready, encoding
        for made, length in zip(ready, lengths, strict=True):
            if length > limit:
                reason = f"too long: a probe of {length} tokens, the limit is {limit}"
                rejected.append(Rejection(made.sample.origin, reason))
        short = [made for made, length in zip(ready, lengths, strict=True) if length <= limit]
        return self._encoder.encode(short, "right", rejected)

    def _alone(self, image: Image.Image) -> dict[str, Tensor]:
        """A picture through the processor, with next to no text."""
        text = self._encoder.chat.render([Turn("user", f"{IMAGE_MARK}\n?")], add_generation_prompt=True).text
        return self._encoder.processing.encode([text], [[image]], "right").inputs

    def _sites(
        self, row: ProbeRow, made: RenderedSample, encoding: Encoding, b: int, picture: int, rejected: list[Rejection]
    ) -> dict[str, Tensor]:
        """Site -> (L,) how much each token counts, above 0 somewhere. ``picture`` is the batch's pictures before it."""
        ids_L, attended_L = encoding.inputs["input_ids"][b], encoding.inputs["attention_mask"][b] > 0
        image_ids = torch.tensor(self._encoder.processing.image_token_ids)
        image = (torch.isin(ids_L, image_ids) & attended_L).nonzero().flatten()
        (span,) = chat.locate_answer_spans(made.rendered, self._encoder.chat.placeholder, encoding.texts[b])
        text = torch.tensor(list(chat.tokens_of_span(span, encoding.offsets[b])), dtype=torch.long)
        assert len(text), "a span of characters has tokens"
        token = _pick_by_hash(image if len(image) else text, row.id)
        read = {"last": attended_L.nonzero()[-1], "image": image, "text": text, "token": token}
        sites = {name: _scatter(torch.ones(len(at)), at, len(ids_L)) for name, at in read.items() if len(at)}
        thw = encoding.inputs.get("image_grid_thw")
        for number, each in enumerate(row.boxes):
            size = made.images[0].size
            shown = self._grids.weights(each.box, size, len(image), None if thw is None else thw[picture])
            if isinstance(shown, str):
                rejected.append(Rejection(row.sample.origin, shown, "cut"))
            elif not shown.any():
                rejected.append(Rejection(row.sample.origin, f"no object site: {each.name!r} is cropped away", "cut"))
            else:
                sites[f"object:{number}"] = _scatter(shown, image, len(ids_L))
        return sites


def _scatter(weights: Tensor, at: Tensor, length: int) -> Tensor:
    """(length,) with these weights at these positions."""
    return torch.zeros(length).index_put((at,), weights)


def _pick_by_hash(positions: Tensor, row_id: str) -> Tensor:
    """One of the positions, the same for this id in every batch and every run."""
    number = int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "little")
    return positions[number % len(positions)].reshape(1)


def probe_loader(
    rows: Sequence[ProbeRow], collator: ProbeCollator, *, batch_size: int, num_workers: int
) -> CheckedDataLoader:
    """This rank's share of the rows, each row once over all ranks, rows of like length together.

    Whole batches are dealt out, so that which rows share one, and with it every digit of what is read, does not depend
    on the number of ranks.

    Args:
        rows: Of a probe set.
        collator: Makes a batch of them.
        batch_size: Most rows of a batch.
        num_workers: Processes that prepare batches.
    """
    rows = sorted(rows, key=lambda row: (row.role, len(row.text), row.id))
    collator.say_what_is_missing(rows)
    size = max(1, min(batch_size, len(rows) // rank_and_world_size()[1]))
    if size < batch_size:
        decide("data.probes", f"batches of {size} rows", f"{len(rows)} rows, {rank_and_world_size()[1]} ranks")
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return evaluation_loader(batches, _UnwrapBatch(collator), batch_size=1, num_workers=num_workers)


class _UnwrapBatch:
    """Collates what is a batch already; a class, for workers are sent it."""

    def __init__(self, collate: ProbeCollator) -> None:
        self._collate = collate

    def __call__(self, batches: list[list[ProbeRow]]) -> ProbeBatch:
        return self._collate(batches[0])
