"""Batches of probe rows: model inputs, and the tokens that belong to each site of a row.

Sites of a row: ``last`` is its last token; ``image`` the image tokens; ``text`` the tokens of the row's span; ``token``
one image token (one of the span, without an image or in a row of role ``text_last``), chosen by a hash of the row's id;
``object:i`` the image tokens whose patches overlap the i-th box, weighted by the overlap. Whole batches are distributed
over the ranks, so that which rows share a batch, and every digit of a hidden state, does not depend on the number of
ranks.

Data flow: rows of a ``ProbeSet`` -> ``probe_loader`` (batches of rows of similar length) -> ``ProbeCollator`` (images
decoded or gray; chat template up to where an answer would begin; one call of the processor) -> ``ProbeBatch`` ->
``analysis.hidden_states``.

Shapes: B rows, L tokens after padding, S sites: the largest number of a row in the batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.distributed import rank_and_world_size
from lightning_mm.data import chat
from lightning_mm.data import images as pictures
from lightning_mm.data.chat import ChatError, Rendered
from lightning_mm.data.dataloader import CheckedDataLoader, evaluation_loader
from lightning_mm.data.probe_sets.build.patch_grids import NO_OBJECT_SITES, PatchGrids
from lightning_mm.data.probe_sets.files import ProbeRow
from lightning_mm.data.probe_sets.probe_set import ProbeBatch
from lightning_mm.data.sample import IMAGE_MARK, Rejection, Turn
from lightning_mm.data.sample_encoder import RenderedSample, SampleEncoder
from lightning_mm.models.encoding import Encoding
from lightning_mm.models.processor import ModelProcessor

GRAY = (127, 127, 127)


class ProbeCollator:
    """Makes batches of probe rows.

    Args:
        processing: The model's processor.
        max_length: Limit on the tokens of a row; a longer one is rejected, never truncated. None sets no limit.
        max_megapixels: Limit on the size of an image, in megapixels.
    """

    def __init__(
        self, processing: ModelProcessor, max_length: int | None = None, *, max_megapixels: float = 40.0
    ) -> None:
        self._encoder = SampleEncoder(processing, max_length, max_megapixels)
        merge_size = int(getattr(processing.processor.image_processor, "merge_size", 1))
        self._grids = PatchGrids(self._encode_alone, processing.config.to_dict(), merge_size)

    def __call__(self, rows: Sequence[ProbeRow]) -> ProbeBatch:
        """A batch of the rows that can be used; it may have no row and then no inputs."""
        rejected: list[Rejection] = []
        by_id = {row.id: row for row in rows}
        ready = [made for row in rows if (made := self._render(row, rejected))]
        ready, encoding = self._encode(ready, rejected)
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

    def log_missing_object_sites(self, rows: Sequence[ProbeRow]) -> None:
        """Log why object sites cannot be read with this processor, by the first row with boxes."""
        for row in [row for row in rows if row.boxes][:1]:
            for reason in dict.fromkeys(each.reason for each in self([row]).rejected):
                if reason.startswith(NO_OBJECT_SITES):
                    log_decision("data.probes.object_at_patches", "not read", reason)

    def _render(self, row: ProbeRow, rejected: list[Rejection]) -> RenderedSample | None:
        try:
            rendered = self._rendered(row)
            images = self._encoder.images(row.sample, len(row.sample.images), rejected)
        except (ChatError, pictures.BadImage) as error:
            rejected.append(Rejection(row.sample.origin, str(error)))
            return None
        if row.blank:
            images = [Image.new("RGB", image.size, GRAY) for image in images]
        return RenderedSample(replace(row.sample, id=row.id), images, rendered)

    def _rendered(self, row: ProbeRow) -> Rendered:
        """The turn in the chat template, with the position of the row's span."""
        text = self._encoder.chat.render(row.sample.turns, add_generation_prompt=True).text
        part = next(piece for piece in row.text.split(IMAGE_MARK) if row.span in piece).strip()
        at = text.rfind(part)
        if at < 0:
            raise ChatError("template changes the question: it is not written as it was given")
        start = at + part.index(row.span)
        return Rendered(text, ((start, start + len(row.span)),))

    def _encode(
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

    def _encode_alone(self, image: Image.Image) -> dict[str, Tensor]:
        """The processor's output for an image with almost no text."""
        text = self._encoder.chat.render([Turn("user", f"{IMAGE_MARK}\n?")], add_generation_prompt=True).text
        return self._encoder.processing.encode([text], [[image]], "right").inputs

    def _sites(
        self, row: ProbeRow, made: RenderedSample, encoding: Encoding, b: int, picture: int, rejected: list[Rejection]
    ) -> dict[str, Tensor]:
        """Site -> (L,) weight of each token, positive for at least one.

        Args:
            row: The probe row.
            made: The same row as it was encoded.
            encoding: Encoding of the whole batch.
            b: Index of the row in the batch.
            picture: Number of images in the batch before this row's.
            rejected: Sites that cannot be read are added to it.
        """
        ids_L, attended_L = encoding.inputs["input_ids"][b], encoding.inputs["attention_mask"][b] > 0
        image_ids = torch.tensor(self._encoder.processing.image_token_ids)
        image = (torch.isin(ids_L, image_ids) & attended_L).nonzero().flatten()
        (span,) = chat.locate_answer_spans(made.rendered, self._encoder.chat.placeholder, encoding.texts[b])
        text = torch.tensor(list(chat.tokens_of_span(span, encoding.offsets[b])), dtype=torch.long)
        assert len(text), "a span of characters has tokens"
        token = _pick_by_hash(image if len(image) and row.role != "text_last" else text, row.id)
        read = {"last": attended_L.nonzero()[-1], "image": image, "text": text, "token": token}
        if row.role in ("text_last", "picture_last") and (int(image.min()) < int(text.min())) != (
            row.role == "text_last"
        ):
            reason = "order not kept: the chat template moves the picture"
            rejected.append(Rejection(row.sample.origin, reason, "cut"))
            del read["token"]
        sites = {name: _scatter(torch.ones(len(at)), at, len(ids_L)) for name, at in read.items() if len(at)}
        thw = encoding.inputs.get("image_grid_thw")
        for number, each in enumerate(row.boxes):
            size = made.images[0].size
            weights = self._grids.weights(each.box, size, len(image), None if thw is None else thw[picture])
            if isinstance(weights, str):
                rejected.append(Rejection(row.sample.origin, weights, "cut"))
            elif not weights.any():
                rejected.append(Rejection(row.sample.origin, f"no object site: {each.name!r} is cropped away", "cut"))
            else:
                sites[f"object:{number}"] = _scatter(weights, image, len(ids_L))
        return sites


def _scatter(weights: Tensor, at: Tensor, length: int) -> Tensor:
    """(length,) zeros with the weights at the positions ``at``."""
    return torch.zeros(length).index_put((at,), weights)


def _pick_by_hash(positions: Tensor, row_id: str) -> Tensor:
    """One of the positions, the same for this id in every batch and run."""
    number = int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "little")
    return positions[number % len(positions)].reshape(1)


def sorted_rows(rows: Sequence[ProbeRow]) -> list[ProbeRow]:
    """Rows of similar length together."""
    return sorted(rows, key=lambda row: (row.role, len(row.text), row.id))


def cut_batches(rows: Sequence[ProbeRow], size: int) -> list[list[ProbeRow]]:
    """Batches of rows of similar length.

    Args:
        rows: Rows of a probe set, in any order.
        size: Rows of a batch.
    """
    ordered = sorted_rows(rows)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def probe_loader(
    rows: Sequence[ProbeRow], collator: ProbeCollator, *, batch_size: int, num_workers: int
) -> CheckedDataLoader:
    """This rank's share of the rows, each row once over all ranks, rows of similar length together.

    Args:
        rows: Rows of a probe set.
        collator: Makes a batch of them.
        batch_size: Largest number of rows in a batch.
        num_workers: Number of worker processes.
    """
    collator.log_missing_object_sites(sorted_rows(rows))
    size = max(1, min(batch_size, len(rows) // rank_and_world_size()[1]))
    if size < batch_size:
        log_decision("data.probes", f"batches of {size} rows", f"{len(rows)} rows, {rank_and_world_size()[1]} ranks")
    batches = cut_batches(rows, size)
    return evaluation_loader(batches, _UnwrapBatch(collator), batch_size=1, num_workers=num_workers)


class _UnwrapBatch:
    """Collate function for items that are batches already; a class, so that it can be pickled for workers."""

    def __init__(self, collate: ProbeCollator) -> None:
        self._collate = collate

    def __call__(self, batches: list[list[ProbeRow]]) -> ProbeBatch:
        return self._collate(batches[0])
