"""How fast the ranks were in an interval, all of them together.

Data flow: one ``Interval`` of each rank -> ``rates``, by the keys of ``names``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mm.dashboards import names


@dataclass(frozen=True)
class Interval:
    """What one rank did between two readings.

    Args:
        samples: Conversations.
        supervised: Tokens whose prediction was trained.
        tokens: All tokens but padding.
        image_tokens: Those that stand for pictures.
        positions: Tokens and padding.
        flops: What the policy needs at least for them; nan where it could not be counted.
        seconds: Of training, waiting for data included.
        waiting: Of these, waiting for data.
        peak: FLOP/s of this rank's matrix products; nan where they could not be measured.
        memory: GiB held at once so far.
    """

    samples: float
    supervised: float
    tokens: float
    image_tokens: float
    positions: float
    flops: float
    seconds: float
    waiting: float
    peak: float
    memory: float


def rates(ranks: Sequence[Interval]) -> dict[str, float]:
    """Rates of all ranks together; what is not known is left out.

    Ranks wait for each other, so they took equally long; the one that knows of most time that was no training (rank 0
    analyses looks inside while the others wait for it) knows best, and the one that waited longest for data held up
    all.
    """
    seconds = max(min(rank.seconds for rank in ranks), 1e-9)
    flops = sum(rank.flops for rank in ranks) / seconds
    found = {
        names.SUPERVISED_TOKENS_PER_SECOND: sum(rank.supervised for rank in ranks) / seconds,
        names.TOKENS_PER_SECOND: sum(rank.tokens for rank in ranks) / seconds,
        names.IMAGE_TOKENS_PER_SECOND: sum(rank.image_tokens for rank in ranks) / seconds,
        names.SAMPLES_PER_SECOND: sum(rank.samples for rank in ranks) / seconds,
        names.TFLOPS: flops / 1e12,
        names.MFU: flops / sum(rank.peak for rank in ranks),
        names.DATA_WAIT: min(1.0, max(rank.waiting for rank in ranks) / seconds),
        names.PADDING: 1 - sum(rank.tokens for rank in ranks) / max(1.0, sum(rank.positions for rank in ranks)),
        names.PEAK_MEMORY: max(rank.memory for rank in ranks),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}
