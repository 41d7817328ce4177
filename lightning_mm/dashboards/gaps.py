"""What could not be measured, and what a reader must know of what was: each reason once, with where it holds.

Data flow: panels -> reasons and notes with the layers, places and measures that they concern -> the report.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mm.dashboards.panels import EMBEDDINGS, Panel
from lightning_mm.dashboards.sections import ranges

_MOST, _LONGEST = 12, 240
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
PEAK_RANGE = re.compile(r"the peak is at layer (-?\d+) to (-?\d+)")
"""The note of a profile's peak that says how sure its place is; the table of headlines shows it."""


@dataclass(frozen=True)
class Gap:
    """One reason why numbers are missing."""

    reason: str
    layers: str
    places: str
    measures: str


def gaps(found: Sequence[Panel]) -> tuple[Gap, ...]:
    """The reasons for undefined values, the most frequent first; those that differ in their numbers only are one."""
    told: dict[str, list[tuple[str, int, Panel]]] = {}
    for panel in found:
        for (_, layer), row in panel.cells.items():
            if row.value is None:
                told.setdefault(_NUMBER.sub("#", row.undefined), []).append((row.undefined, layer, panel))
    ordered = sorted(told.values(), key=lambda where: -len(where))
    listed = [
        Gap(
            spelled([reason for reason, _, _ in where]),
            _layers({layer for _, layer, _ in where}),
            "; ".join(sorted({panel.place for _, _, panel in where if panel.place})),
            _listed([panel.measure.title for _, _, panel in where]),
        )
        for where in ordered[:_MOST]
    ]
    if len(ordered) > _MOST:
        listed.append(Gap(f"{len(ordered) - _MOST} further reasons stand in layers.csv", "", "", ""))
    return tuple(listed)


def notes(found: Sequence[Panel]) -> tuple[tuple[str, str], ...]:
    """The notes on the values of the last step, each with the measures it concerns."""
    told: dict[str, list[tuple[str, str]]] = {}
    for panel in found:
        for (step, _), row in panel.cells.items():
            if step == panel.steps[-1] and row.value is not None:
                for note in filter(None, row.notes.split("; ")):
                    if not PEAK_RANGE.match(note):
                        told.setdefault(_NUMBER.sub("#", note), []).append((note, panel.measure.title))
    listed = [
        (spelled([note for note, _ in where]), _listed([title for _, title in where]))
        for where in list(told.values())[:_MOST]
    ]
    return tuple(
        listed + ([(f"{len(told) - _MOST} further notes stand in layers.csv", "")] if len(told) > _MOST else [])
    )


def spelled(texts: Sequence[str]) -> str:
    """Texts that differ in their numbers only, as one with the range of each.

    Example:
        >>> spelled(["all 64 of 64 coincide", "all 26 of 64 coincide"])
        'all 26–64 of 64 coincide'
    """
    slots = iter([sorted(set(slot), key=float) for slot in zip(*map(_NUMBER.findall, texts), strict=True)])

    def ranged(_: re.Match[str]) -> str:
        seen = next(slots)
        return seen[0] if len(seen) == 1 else f"{seen[0]}–{seen[-1]}"

    return _NUMBER.sub(ranged, texts[0])[:_LONGEST]


def _layers(layers: set[int]) -> str:
    blocks = sorted(layers - {EMBEDDINGS})
    words = ["embeddings"] if EMBEDDINGS in layers else []
    words += [f"layer{'s' if len(blocks) > 1 else ''} {ranges(blocks)}"] if blocks else []
    return " and ".join(words)


def _listed(titles: Sequence[str]) -> str:
    names = list(dict.fromkeys(titles))
    return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:4])} and {len(names) - 4} more"
