"""Batches of a few rows outside of any loader: to measure a step with, and gradients.

Data flow: Samples -> the collator -> ``Batch``; rows that cannot be used are left to the loader to record.
"""

import random
from collections.abc import Sequence

import numpy as np

from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch, TokenRegion
from lightning_mm.data.collator import Collator
from lightning_mm.data.row_table import RowTable
from lightning_mm.data.sample import Rejection, Sample
from lightning_mm.data.token_lengths import local_token_lengths

_MAX_EXAMPLES = 32
"""Rows from the first on, and as many from all over the data, that are tried until one can be used."""

_NUM_MIXED = 4
"""Rows of a batch that holds the kinds of rows that the data has."""
_MOST_TOKENS = 4096
"""Of such a batch, padding included, where it has more than two rows: it runs on top of what training takes."""


def random_batches(samples: Sequence[Sample], collator: Collator, count: int, size: int, seed: int) -> list[Batch]:
    """Random batches without replacement; fewer where there are fewer samples.

    Args:
        samples: What is drawn from.
        collator: Makes a batch.
        count: Number of batches.
        size: Samples per batch.
        seed: Of the draw.
    """
    drawn = random.Random(seed).sample(samples, min(len(samples), count * size))
    return [collator(drawn[start : start + size]) for start in range(0, len(drawn), size)]


def example_batch(samples: Sequence[Sample], collator: Collator, count: int) -> Batch:
    """A batch of the first samples with images; of others where these cannot be used.

    Args:
        samples: What is tried: some of the first, and some from everywhere.
        collator: Makes a batch.
        count: Samples of the batch, or fewer where there are fewer.

    Raises:
        UserError: None of those tried can be used.
    """
    counts = samples.num_images() if isinstance(samples, RowTable) else [len(each.images) for each in samples]
    rows = np.argsort(np.asarray(counts) == 0, kind="stable")  # those with images first
    drawn = dict.fromkeys([*rows[:_MAX_EXAMPLES], *rows[:: max(1, len(rows) // _MAX_EXAMPLES)]])
    tried, rejected = [samples[int(row)] for row in drawn], list[Rejection]()
    for start in range(0, len(tried), count):
        if (batch := collator.collate_valid(tried[start : start + count], rejected)) is not None:
            return batch
    raise _no_example(tried, rejected, collator)


def mixed_batch(samples: Sequence[Sample], collator: Collator) -> Batch | None:
    """A padded batch of rows as different as the data has them; None where none of those tried can be used.

    Of the first rows and of some from everywhere: one without pictures, one with most, the shortest and one of median
    length. Of rows that together take much memory, the longest are left out.

    Args:
        samples: What is tried.
        collator: Makes the batch.
    """
    every = max(1, len(samples) // _MAX_EXAMPLES)
    numbers = dict.fromkeys([*range(min(len(samples), _MAX_EXAMPLES)), *range(0, len(samples), every)])
    tried = [samples[number] for number in numbers]
    by_length = sorted(tried, key=lambda sample: sum(len(turn.text) for turn in sample.turns))
    by_pictures = sorted(by_length, key=lambda sample: len(sample.images))
    middle = len(tried) // 2
    chosen = {id(s): s for s in (by_length[middle], by_pictures[0], by_pictures[-1], by_length[0])} if tried else {}
    ordered = [*chosen.values(), *(s for s in tried if id(s) not in chosen)]
    rejected: list[Rejection] = []
    for start in range(0, len(ordered), _NUM_MIXED):
        if (batch := collator.collate_valid(ordered[start : start + _NUM_MIXED], rejected)) is not None:
            return _without_longest(batch, collator)
    return None


def _without_longest(batch: Batch, collator: Collator) -> Batch:
    """The batch without its longest rows while it has too many tokens with its padding; two are left."""
    while len(batch) > 2 and batch.regions.numel() > _MOST_TOKENS:
        lengths = (batch.regions != TokenRegion.PAD).sum(1)
        longest = int(lengths.argmax())
        kept = [sample for number, sample in enumerate(batch.samples) if number != longest]
        smaller = collator.collate_valid(kept, [])
        assert smaller is not None, "rows that could be used together can be used without one of them"
        batch = smaller
    return batch


def _no_example(tried: Sequence[Sample], rejected: Sequence[Rejection], collator: Collator) -> UserError:
    """Why none of the rows tried can be made into a batch; with their lengths where these are the reason."""
    dropped = [each for each in rejected if each.kind == "dropped"]
    what = f"None of {len(tried)} rows from all over the data can be used."
    cause = f"{dropped[0].origin}: {dropped[0].reason}."
    if not all(each.reason.startswith("too long") for each in dropped):
        return UserError(what, cause, "Mend or remove such rows.")
    limits = collator.encoder
    lengths = sorted(local_token_lengths(tried, collator.processing, limits.max_megapixels, limits.video_frames))
    return UserError(
        what,
        f"They have {lengths[0]} tokens and more, {lengths[len(lengths) // 2]} in the median; data.max_length is "
        f"{limits.max_length}. The first of them: {cause}",
        "Raise data.max_length, or give data.max_pixels, so that pictures take fewer tokens.",
    )
