"""Layers at W&B: one small table and one picture per main measure, never a chart per layer; one table of a whole run.

Data flow: rows of an inspection -> tables by measure; rows of all inspections so far -> a heat map per main measure;
rows of a finished run -> one table by step, layer and site, by which runs are compared.

Shapes: a heat map is L layers upwards x S steps, one per site, side by side.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_mm.core.io import read_json
from lightning_mm.core.layer_table import LayerRow, read_layers
from lightning_mm.core.measure_catalog import measure
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report.figures.class_maps import class_maps
from lightning_mm.report.figures.figure import Figure
from lightning_mm.report.figures.layers import heat_map_figure
from lightning_mm.report.tables.panels import Panel, TrainedLayers, panels

COLUMNS = ("step", "layer", "measure", "site", "value", "low", "high", "null", "p_adjusted", "n", "k", "undefined")
_MOST_SITES = 4


def tables(rows: Sequence[LayerRow]) -> dict[str, list[list[Any]]]:
    """Rows by the table they belong to: each main quantity has its own, all others share one per question."""
    by_table: dict[str, list[list[Any]]] = {}
    for row in rows:
        known = measure(row.measure)
        key = f"layers/{_plain(row.measure)}" if known.main else f"layers/more_{known.question}"
        by_table.setdefault(key, []).append([getattr(row, column) for column in COLUMNS])
    return by_table


def comparison(name: str, policy: str, rows: Sequence[LayerRow], trained: TrainedLayers) -> tuple[list[str], list[Any]]:
    """Columns and rows of the table that compares runs: a row per step, layer and site, a column per measure.

    Args:
        name: The run's name, so that rows tell their run wherever tables of several are put together.
        policy: The run's policy with its layers.
        rows: All rows of the run.
        trained: The layers that train.
    """
    measures = sorted({row.measure for row in rows if row.value is not None})
    values: dict[tuple[int, int, str], dict[str, float | None]] = {}
    for row in sorted(rows, key=lambda row: (row.step, row.site, row.layer)):
        values.setdefault((row.step, row.layer, row.site), {})[row.measure] = row.value
    head = ["run", "policy", "step", "layer", "site", "trained"]
    table = [
        [name, policy, *key, key[1] in trained.layers, *(found.get(measure) for measure in measures)]
        for key, found in values.items()
    ]
    return [*head, *map(_plain, measures)], table


def pictures(directory: Path, rows: Sequence[LayerRow]) -> dict[str, Image.Image]:
    """A heat map of each main quantity over all inspections so far, and what this one traced by kind of token.

    Args:
        directory: The run directory; its layers.csv tells earlier inspections, its census what trains.
        rows: The rows of this inspection.
    """
    run = RunDirectory(directory)
    steps, names = {row.step for row in rows}, {row.measure for row in rows}
    before = read_layers(run.layers)[0] if run.layers.exists() else []
    trained = TrainedLayers.of(read_json(run.census)) if run.census.exists() else TrainedLayers()
    by_name: dict[str, list[Panel]] = {}
    for panel in panels([*(row for row in before if row.step not in steps), *rows]):
        if panel.measure.main and panel.measure.name in names and panel.measured:
            by_name.setdefault(panel.measure.name, []).append(panel)
    shown = {
        f"layer_maps/{_plain(name)}": [heat_map_figure(panel, found, trained) for panel in found[:_MOST_SITES]]
        for name, found in by_name.items()
    }
    shown["layer_maps/trace"] = [each.figure(trained, headed=True) for each in class_maps(rows)]
    return {key: _side_by_side(figures) for key, figures in shown.items() if figures}


def _side_by_side(figures: Sequence[Figure]) -> Image.Image:
    """Several figures as one picture."""
    images = [Image.open(io.BytesIO(figure.png())).convert("RGB") for figure in figures]
    both = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)), "white")
    left = 0
    for image in images:
        both.paste(image, (left, 0))
        left += image.width
    return both


def _plain(name: str) -> str:
    """Slashes would make W&B nest the key, and hide the panel in a section of its own."""
    return name.replace("/", "_")
