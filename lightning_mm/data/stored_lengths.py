"""Token lengths of a table, measured once: the next run on the same rows and processor reads them from disk.

Data flow: ``RowTable`` + processor -> ``lengths/KEY.npy`` in the cache, or ``token_lengths`` and then that file ->
``TokenLengths``; its longest row -> ``longest_needed`` (``max_length: auto``).

Shapes: N rows.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch
import xxhash

from lightning_mm.core.decisions import log, log_decision
from lightning_mm.core.distributed import all_gather_object
from lightning_mm.core.io import write_atomically
from lightning_mm.data.picture_check import checked_part
from lightning_mm.data.row_table import RowTable
from lightning_mm.data.token_lengths import TokenLengths, measure_token_lengths
from lightning_mm.models.processor import ModelProcessor

_FORMAT = 1
"""Part of every key: a change of what is measured makes new files."""


def stored_token_lengths(
    samples: RowTable, processing: ModelProcessor, cache: Path, *, max_megapixels: float = 40.0, video_frames: int = 8
) -> TokenLengths:
    """Lengths of all rows before any is cut, equal on every rank; a collective call of all ranks.

    Args:
        samples: N training samples.
        processing: The model's processor.
        cache: Folder of all tables.
        max_megapixels: Limit on the size of an image, in megapixels.
        video_frames: Frames per video.
    """
    file = cache / "lengths" / f"{_key(samples, processing, max_megapixels, video_frames)}.npy"
    stored = _read(file, len(samples))
    if all(all_gather_object(stored is not None)) and stored is not None:
        log.info("data.lengths: as measured before, %s", file)
        return stored
    options = {"max_megapixels": max_megapixels, "video_frames": video_frames}
    lengths = measure_token_lengths(samples, processing, **options)  # type: ignore[arg-type]
    if stored is None:
        content = io.BytesIO()
        np.save(content, np.stack([lengths.tokens.numpy(), lengths.vision.numpy()], axis=1))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, content.getvalue())
        except OSError as error:
            log_decision("data.lengths", "not kept", f"{file} cannot be written: {error}")
    return lengths


def longest_needed(lengths: TokenLengths, context: int | None) -> int:
    """The shortest ``max_length`` that cuts no row and is within the model's context; logged with its reason.

    Args:
        lengths: Of the training rows.
        context: Longest text of the model, in tokens; None: it has no limit.
    """
    longest = int(lengths.tokens.max())
    if context is None or longest <= context:
        reason = f"auto: the longest of {len(lengths):,} training rows"
        longest_allowed = longest
    else:
        longer = int((lengths.tokens > context).sum())
        reason = f"auto: the model's context; {longer:,} of {len(lengths):,} training rows are longer"
        longest_allowed = context
    log_decision("data.max_length", longest_allowed, reason)
    return longest_allowed


def _read(file: Path, num_rows: int) -> TokenLengths | None:
    """Lengths of a file; None where there is none, or none of so many rows."""
    try:
        stored = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    if stored.shape != (num_rows, 2):
        return None
    return TokenLengths(torch.from_numpy(stored[:, 0].astype(np.int64)), torch.from_numpy(stored[:, 1].copy()))


def _key(samples: RowTable, processing: ModelProcessor, max_megapixels: float, video_frames: int) -> str:
    """Digest of all that the lengths depend on: rows, sizes of their pictures, and the processor."""
    sizes = xxhash.xxh3_64()
    for part in samples.parts:
        sizes.update(checked_part(part.file).sizes.tobytes())
    content = [_FORMAT, samples.fingerprint, sizes.hexdigest(), processing.identity, max_megapixels, video_frames]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
