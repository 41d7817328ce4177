"""The page of a study: what it says in sentences first, then the numbers and charts that these come from.

Data flow: plain data of ``study.report`` -> figures -> ``templates/study.html.jinja`` -> study.html.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from lightning_mm.core.layer_table import LayerRow
from lightning_mm.report.figures.compared import RunPanel, compared_profiles, run_style
from lightning_mm.report.figures.curves import LegendEntry
from lightning_mm.report.figures.figure import Figure, printable
from lightning_mm.report.figures.intervals import IntervalRow, TradeRow, interval_rows, trade_chart
from lightning_mm.report.html import write_page
from lightning_mm.report.tables.panels import panels


@dataclass(frozen=True)
class StudyTable:
    """A table of a study.

    Args:
        title: Above it.
        columns: Their names; the first column names the rows.
        rows: Cells as they are shown.
        note: Below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


@dataclass(frozen=True)
class Differences:
    """Differences with intervals, drawn as rows."""

    title: str
    place: str
    unit: str
    rows: Sequence[IntervalRow]


@dataclass(frozen=True)
class Trade:
    """Gain against cost."""

    title: str
    place: str
    cost: str
    gain: str
    rows: Sequence[TradeRow]


@dataclass(frozen=True)
class LayerCurves:
    """One measure over the layers of several models.

    Args:
        title: What is asked.
        curves: Model -> its rows of one measure and site.
    """

    title: str
    curves: Mapping[str, Sequence[LayerRow]]


@dataclass(frozen=True)
class StudyPage:
    """What the page of a study holds.

    Args:
        name: Of the study.
        outcome: The shortest answer.
        sections: (question, answers).
        covers: What the intervals mean.
        facts: What was trained and measured, in words.
        differences: Charts of differences.
        trades: Charts of gain against cost.
        tables: Tables.
        layers: Curves over layers.
    """

    name: str
    outcome: str
    sections: Sequence[tuple[str, Sequence[str]]]
    covers: str
    facts: Sequence[str]
    differences: Sequence[Differences] = ()
    trades: Sequence[Trade] = ()
    tables: Sequence[StudyTable] = field(default=())
    layers: Sequence[LayerCurves] = ()


@dataclass(frozen=True)
class _Card:
    title: str
    place: str
    figure: Figure
    legend: tuple[LegendEntry, ...] = ()


def write_study_page(path: Path, page: StudyPage) -> Path:
    """Write study.html; returns its path.

    Args:
        path: The file.
        page: What it holds.

    Raises:
        UserError: It cannot be written.
    """
    forests = [
        _Card(each.title, each.place, interval_rows(each.rows, each.unit, f"{each.title}, {each.place}").drawn())
        for each in page.differences
        if each.rows
    ]
    trades = [
        _Card(
            each.title,
            each.place,
            trade_chart(each.rows, each.cost, each.gain, f"{each.title}, {each.place}").drawn(),
        )
        for each in page.trades
        if each.rows
    ]
    content = {
        "name": printable(page.name),
        "outcome": printable(page.outcome),
        "sections": [(printable(title), [printable(each) for each in told]) for title, told in page.sections],
        "covers": page.covers,
        "facts": [printable(each) for each in page.facts],
        "charts": [*forests, *trades],
        "tables": page.tables,
        "layers": [card for each in page.layers if (card := _layer_card(each)) is not None],
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    }
    return write_page(path, "study.html.jinja", content)


def _layer_card(given: LayerCurves) -> _Card | None:
    runs = []
    for index, (name, rows) in enumerate(given.curves.items()):
        found = [panel for panel in panels(rows) if panel.measured]
        if found:
            runs.append(RunPanel(printable(name), run_style(index), found[0]))
    if not runs:
        return None
    figure, legend = compared_profiles(runs)
    return _Card(given.title, runs[0].panel.place, figure.drawn(), legend)
