"""What keeping the frozen part on disk would save, told without running anything.

Data flow: plan + FLOPs of a step + what enters the blocks of a rehearsed one -> ``Saving``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mm.data.batch import Batch
from lightning_mm.errors import UserError
from lightning_mm.models.anatomy import Anatomy, Region
from lightning_mm.tuning.cache import boundary_of, moves
from lightning_mm.tuning.flops import StepFlops
from lightning_mm.tuning.policy import TuningPlan
from lightning_mm.tuning.shape import StepShape
from lightning_mm.tuning.tally import Tally

_BELOW = (Region.OTHER, Region.VISION, Region.CONNECTOR, Region.EMBEDDING)


@dataclass(frozen=True)
class Saving:
    """Of a step whose rows are all known.

    Args:
        flops: Less; None where nothing can be kept.
        record: Bytes kept of a mean row, as float32.
        why: Nothing can be kept.
    """

    flops: float | None
    record: float = 0.0
    why: str = ""


def saving(
    plan: TuningPlan,
    anatomy: Anatomy,
    spent: StepFlops,
    done: Tally,
    largest: Batch,
    mean: StepShape,
    unread: Sequence[str],
) -> Saving:
    """By what enters the lowest block that trains, or by the features of a frozen tower.

    Args:
        plan: What trains.
        anatomy: Of the model.
        spent: FLOPs of a mean step.
        done: The step that was rehearsed, in float32.
        largest: Its batch.
        mean: Shape of one mean row, without padding.
        unread: Vision blocks that are passed by anyway.
    """
    read = [name for name in anatomy.vision_blocks if name not in unread]
    try:
        first = boundary_of(plan)
    except UserError as error:
        pixels = StepShape.of(largest).pixels
        if moves(plan, Region.VISION) or not read or not pixels:
            return Saving(None, why=error.why)
        return Saving(spent.region(Region.VISION).total, done.entering[read[-1]] * mean.pixels / pixels)
    below = [*(spent.region(region) for region in _BELOW), spent.layers(range(first))]
    per_token = done.entering[anatomy.layers[0]] / largest.regions.numel()
    return Saving(sum(part.total for part in below), mean.tokens * per_token)
