"""What a probe found in every layer.

Data flow: ``protocol`` makes one of a block of layers at a time and joins them; ``analysis`` reads its estimates.

Shapes: L layers, F test parts, B draws.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mm.estimate import Estimate, undefined
from lightning_mm.probes import intervals

Row = list[Estimate]
"""One Estimate per layer."""


def unfinished(row: Row, share_L: Tensor) -> Row:
    """The same with a note where some share of the probes behind an estimate has not converged."""
    return [
        one.noted(f"{share:.0%} of the probes have not converged" if share > 0 else "")
        for one, share in zip(row, share_L.tolist(), strict=True)
    ]


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a linear probe reads in each layer.

    Args:
        scores: By name, one Estimate per layer; see ``summary``. The first is the main one: accuracy or auroc.
        draws: (L, B) bootstrap draws of the main score, the same groups in all layers; NaN where undefined.
        p_values: Per layer, of a main score this high by chance; NaN where undefined.
        c: (L, F) the chosen C; NaN where undefined.
        control: Main score of the control task, if asked for.
        selectivity: Main score minus control.
        compression: Of the labels by an online code, if asked for.
    """

    scores: Mapping[str, Row]
    draws: Tensor
    p_values: list[float]
    c: Tensor
    control: Row | None = None
    selectivity: Row | None = None
    compression: Row | None = None

    @property
    def estimates(self) -> Row:
        """The main score."""
        return next(iter(self.scores.values()))

    @property
    def peak(self) -> tuple[int, int, int] | None:
        """See ``intervals.peak``."""
        return intervals.peak(self.estimates, self.draws)

    @property
    def plateau(self) -> tuple[int, int] | None:
        """See ``intervals.plateau``."""
        return intervals.plateau(self.estimates)

    @classmethod
    def undefined(cls, names: Sequence[str], row: Row, *, control: bool, compression: bool) -> "ProbeResult":
        """Of scores with such names, nothing but reasons."""
        empty, nan, asked = torch.full((len(row), 1), math.nan), [math.nan] * len(row), row if control else None
        return cls(dict.fromkeys(names, row), empty, nan, empty, asked, asked, row if compression else None)

    @classmethod
    def joined(cls, blocks: Sequence["ProbeResult"]) -> "ProbeResult":
        """Of consecutive blocks of layers."""

        def row(rows: list[Row | None]) -> Row | None:
            return None if None in rows else [one for found in rows if found is not None for one in found]

        first = blocks[0]
        return cls(
            scores={name: [one for block in blocks for one in block.scores[name]] for name in first.scores},
            draws=torch.cat([block.draws for block in blocks]),
            p_values=[p for block in blocks for p in block.p_values],
            c=torch.cat([block.c for block in blocks]),
            control=row([block.control for block in blocks]),
            selectivity=row([block.selectivity for block in blocks]),
            compression=row([block.compression for block in blocks]),
        )

    def each(self, change: Callable[[Row], Row]) -> "ProbeResult":
        """The same with every row of estimates changed."""
        control, selectivity, compression = (
            None if row is None else change(row) for row in (self.control, self.selectivity, self.compression)
        )
        scores = {name: change(row) for name, row in self.scores.items()}
        return replace(self, scores=scores, control=control, selectivity=selectivity, compression=compression)

    def without(self, faults: Sequence[str], n: int) -> "ProbeResult":
        """The same with nothing said of faulty layers, but why; n samples were there."""
        faulty = torch.tensor([bool(fault) for fault in faults], device=self.draws.device)[:, None]
        kept = self.each(lambda row: [undefined(f, n) if f else one for f, one in zip(faults, row, strict=True)])
        p_values = [math.nan if fault else p for fault, p in zip(faults, self.p_values, strict=True)]
        draws, c = (torch.where(faulty, math.nan, found) for found in (self.draws, self.c))
        return replace(kept, draws=draws, c=c, p_values=p_values)
