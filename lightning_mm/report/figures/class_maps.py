"""What comes back by kind of token, averaged over questions: layers upwards, kinds to the right, one map per site.

Data flow: rows of layers.csv, measure ``trace``, sites ``<site>/<class>`` -> ``Drawing`` -> report.html and W&B.

Shapes: L layers x K kinds of tokens; cells whose interval holds no effect are pale.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lightning_mm.core.layer_table import LayerRow
from lightning_mm.core.measure_catalog import MODULE_SITES, TOKEN_CLASSES
from lightning_mm.report.figures import colors
from lightning_mm.report.figures.drawing import Box, Drawing, Ring, Shape, Words, hatched
from lightning_mm.report.figures.layer_axis import LayerAxis
from lightning_mm.report.figures.trace_maps import edges, legend, side
from lightning_mm.report.tables.numbers import percent
from lightning_mm.report.tables.panels import Trained, spoken

_LEFT, _COLUMN, _TOP = 42.0, 54.0, 10.0
_MOST_SITES, _MOST_CLASSES = 6, 12


@dataclass(frozen=True)
class ClassMap:
    """One site at one step.

    Args:
        site: What is put back.
        classes: (K,) the kinds of tokens, in reading order.
        rows: By (layer, kind).
        reach: The value of the strongest colour.
    """

    site: str
    classes: tuple[str, ...]
    rows: Mapping[tuple[int, str], LayerRow]
    reach: float

    @property
    def title(self) -> str:
        return f"{MODULE_SITES.get(self.site, self.site)} put back"

    @property
    def best(self) -> LayerRow | None:
        """Where most comes back, of what its interval tells from no effect."""
        clear = [row for row in self.rows.values() if row.value is not None and row.value > 0 and not is_pale(row)]
        return max(clear, key=lambda row: row.value or 0.0, default=None)

    @property
    def said(self) -> str:
        best = self.best
        if best is None:
            return "nothing that its interval tells from no effect"
        return f"most at {spoken(best.layer)}, {class_words(best)}"

    def drawing(self, trained: Trained, *, headed: bool = False) -> Drawing:
        """As a drawing; ``headed`` with its title above it."""
        layers = [layer for layer, _ in self.rows]
        axis = LayerAxis(min(0, *layers), max(trained.total - 1, *layers), trained, _TOP + 20 * headed)
        right = _LEFT + _COLUMN * len(self.classes)
        shapes: list[Shape] = [
            *self._cells(axis),
            *side(axis, _LEFT),
            *edges(axis, _LEFT, right),
            *self._below(axis.bottom + 14),
            *legend(_LEFT, axis.bottom + 38, self.reach),
        ]
        best = self.best
        if best is not None:
            kind = best.site.partition("/")[2]
            x = _LEFT + _COLUMN * (self.classes.index(kind) + 0.5)
            shapes.append(Ring(x, axis.y(best.layer), max(5.0, axis.row / 2 + 2)))
        if headed:
            shapes.append(Words(_LEFT, 18, self.title, "strong"))
        width = max(right + 12, _LEFT + 200)
        return Drawing(width, axis.bottom + 66, f"{self.title}: {self.said}", tuple(shapes))

    def _cells(self, axis: LayerAxis) -> Iterator[Shape]:
        void = []
        for (layer, kind), row in self.rows.items():
            x, y = _LEFT + _COLUMN * self.classes.index(kind), axis.y(layer) - axis.row / 2
            if row.value is None:
                void.append(Box(x, y, _COLUMN, axis.row, "none", _tip(row)))
                continue
            look = f"d{colors.signed_level(row.value / self.reach)}"
            yield Box(x, y, _COLUMN, axis.row, look, _tip(row), is_pale(row))
        if void:
            yield from void
            yield hatched(void)

    def _below(self, y: float) -> Iterator[Shape]:
        """The kinds of tokens, in two lines where they have two words."""
        for number, kind in enumerate(self.classes):
            look = "ink" if kind == "constraint" else ""
            first, _, rest = (
                TOKEN_CLASSES.get(kind, kind[:9]).replace(",", "").replace("rest of ", "rest_of ").partition(" ")
            )
            for line, words in enumerate(filter(None, (first.replace("_", " "), rest))):
                yield Words(_LEFT + _COLUMN * (number + 0.5), y + 12 * line, words, look, "middle")


def class_maps(rows: Sequence[LayerRow]) -> list[ClassMap]:
    """One map per site, of the last step; parts of a layer share their colours, the residual stream has its own."""
    traced = [row for row in rows if row.measure == "trace" and "/" in row.site]
    last = max((row.step for row in traced), default=0)
    by_site: dict[str, dict[tuple[int, str], LayerRow]] = {}
    for row in traced:
        if row.step == last:
            site, _, kind = row.site.partition("/")
            by_site.setdefault(site[:40], {})[row.layer, kind] = row
    order = list(MODULE_SITES)
    sites = sorted(by_site, key=lambda site: order.index(site) if site in order else len(order))[:_MOST_SITES]
    parts = [row for site in sites if site != "residual" for row in by_site[site].values()]
    return [
        ClassMap(site, _ordered(by_site[site]), _known(by_site[site]), _reach(_own(site, parts, by_site[site])))
        for site in sites
    ]


def is_pale(row: LayerRow) -> bool:
    """Whether no effect lies within the interval."""
    null = row.null or 0.0
    return row.low is not None and row.high is not None and row.low <= null <= row.high


def class_words(row: LayerRow) -> str:
    """The kind of token that a row is about."""
    kind = row.site.partition("/")[2]
    return TOKEN_CLASSES.get(kind, kind[:40])


def _own(site: str, parts: Sequence[LayerRow], own: Mapping[tuple[int, str], LayerRow]) -> Sequence[LayerRow]:
    return list(own.values()) if site == "residual" else parts


def _reach(rows: Sequence[LayerRow]) -> float:
    return max((abs(row.value) for row in rows if row.value is not None), default=0.0) or 1.0


def _ordered(rows: Mapping[tuple[int, str], LayerRow]) -> tuple[str, ...]:
    kinds = dict.fromkeys(kind for _, kind in rows)
    known = [kind for kind in TOKEN_CLASSES if kind in kinds]
    return tuple([*known, *(kind for kind in kinds if kind not in TOKEN_CLASSES)][:_MOST_CLASSES])


def _known(rows: Mapping[tuple[int, str], LayerRow]) -> dict[tuple[int, str], LayerRow]:
    kinds = set(_ordered(rows))
    return {(layer, kind): row for (layer, kind), row in rows.items() if kind in kinds}


def _tip(row: LayerRow) -> str:
    where = f"{spoken(row.layer)}, {class_words(row)}"
    if row.value is None:
        return f"{where}: undefined ({row.undefined[:200]})"
    words = f"{where}: {percent(row.value)}"
    if row.low is not None and row.high is not None:
        words += f" ({percent(row.low)} to {percent(row.high)})"
    words += f", no effect {percent(row.null)}" if row.null is not None else ""
    return words + (f", N {row.n:,}" if row.n is not None else "")
