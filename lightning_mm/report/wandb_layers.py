"""What W&B is shown of the layers: one small table and one picture per main quantity, never a chart per layer.

Data flow: rows of an inspection -> tables by quantity; rows of all inspections so far -> a heat map per main quantity.

Shapes: a heat map is L layers upwards x S steps, one block per site, side by side.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mm.core.io import read_json
from lightning_mm.core.layer_table import LayerRow, read_layers
from lightning_mm.core.measure_catalog import measure
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report.figures import colors
from lightning_mm.report.figures.class_maps import class_maps
from lightning_mm.report.figures.heatmaps import Scale
from lightning_mm.report.figures.layer_axis import LayerAxis
from lightning_mm.report.tables.numbers import short
from lightning_mm.report.tables.panels import Panel, Trained, panels, short_name, thinned

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

COLUMNS = ("step", "layer", "measure", "site", "value", "low", "high", "null", "n", "k", "undefined")
_MOST_STEPS, _MOST_SITES = 24, 4
_WIDTH, _LEFT, _TOP, _BELOW, _ZOOM = 190, 46, 30, 44, 2
_PAPER, _INK, _SOFT, _TEAL, _VOID = (255, 255, 255), (34, 38, 43), (93, 99, 107), (13, 111, 115), (230, 227, 221)


def tables(rows: Sequence[LayerRow]) -> dict[str, list[list[Any]]]:
    """Rows by the table they belong to: each main quantity has its own, all others share one per question."""
    found: dict[str, list[list[Any]]] = {}
    for row in rows:
        known = measure(row.measure)
        key = f"layers/{_plain(row.measure)}" if known.main else f"layers/more_{known.question}"
        found.setdefault(key, []).append([getattr(row, column) for column in COLUMNS])
    return found


def pictures(directory: Path, rows: Sequence[LayerRow]) -> dict[str, "Image"]:
    """A heat map of each main quantity over all inspections so far, and what this one traced by kind of token.

    Args:
        directory: The run directory; its layers.csv tells earlier inspections, its census what trains.
        rows: The rows of this inspection.
    """
    run = RunDirectory(directory)
    steps, names = {row.step for row in rows}, {row.measure for row in rows}
    before = read_layers(run.layers)[0] if run.layers.exists() else []
    trained = Trained.of(read_json(run.census)) if run.census.exists() else Trained()
    by_name: dict[str, list[Panel]] = {}
    for panel in panels([*(row for row in before if row.step not in steps), *rows]):
        if panel.measure.main and panel.measure.name in names and panel.measured:
            by_name.setdefault(panel.measure.name, []).append(panel)
    maps = {f"layer_maps/{_plain(name)}": _picture(found[:_MOST_SITES], trained) for name, found in by_name.items()}
    traced = [each.drawing(trained, headed=True).image() for each in class_maps(rows)]
    return maps | ({"layer_maps/trace": _beside(traced)} if traced else {})


def row_of(row: LayerRow | Mapping[str, Any]) -> LayerRow:
    """A row, or the dict of one, as a row."""
    return row if isinstance(row, LayerRow) else LayerRow(**row)


def _plain(name: str) -> str:
    """Slashes would make W&B nest the key, and hide the panel in a section of its own."""
    return name.replace("/", "_")


def _beside(pictures: Sequence["Image"]) -> "Image":
    from PIL import Image

    both = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), _PAPER)
    left = 0
    for picture in pictures:
        both.paste(picture, (left, 0))
        left += picture.width
    return both


def _picture(found: Sequence[Panel], trained: Trained) -> "Image":
    from PIL import Image, ImageDraw

    axis = LayerAxis.over(sorted({layer for panel in found for layer in panel.layers}), trained, _TOP)
    size = (len(found) * (_LEFT + _WIDTH) + 14, round(axis.bottom) + _BELOW)
    picture = Image.new("RGB", (size[0] * _ZOOM, size[1] * _ZOOM), _PAPER)
    for number, panel in enumerate(found):
        _block(ImageDraw.Draw(picture), panel, axis, number * (_LEFT + _WIDTH) + _LEFT)
    return picture


def _block(draw: "ImageDraw", panel: Panel, axis: LayerAxis, left: float) -> None:
    """One site: its cells, what trains beside them, its layers, steps and scale."""
    steps = thinned(panel.steps, _MOST_STEPS)
    scale, width = Scale.of(panel, steps), (_WIDTH - 16) / len(steps)
    for column, step in enumerate(steps):
        for layer in panel.layers:
            if (step, layer) in panel.cells:
                value = panel.value(step, layer)
                fill = _VOID if value is None else colors.LIGHT[colors.level(scale.share(value))]
                x, y = left + column * width, axis.y(layer) - axis.row / 2
                _box(draw, x, y, x + width, y + axis.row, fill)
    for top, bottom in axis.stretches:
        _box(draw, left - 8, top, left - 3, bottom, _TEAL)
    for layer in axis.numbered:
        inside = layer in axis.trained.layers
        _text(
            draw,
            left - 12,
            axis.y(layer) + 4,
            short_name(layer),
            "rs",
            _TEAL if inside else _SOFT,
        )
    right = left + width * len(steps)
    _text(draw, left, _TOP - 10, panel.place or panel.measure.title, "ls", _INK)
    _text(draw, left, axis.bottom + 15, short(steps[0]), "ls", _SOFT)
    _text(draw, right, axis.bottom + 15, short(steps[-1]) if len(steps) > 1 else "", "rs", _SOFT)
    for level, fill in enumerate(colors.LIGHT):
        start = left + level * (right - left) / colors.LEVELS
        _box(draw, start, axis.bottom + 21, start + (right - left) / colors.LEVELS, axis.bottom + 27, fill)
    pale, strong = (panel.spell(scale.rounded(end)).replace("\u00a0", " ") for end in scale.ends)
    _text(draw, left, axis.bottom + 40, pale, "ls", _SOFT)
    _text(draw, right, axis.bottom + 40, strong, "rs", _SOFT)


def _box(draw: "ImageDraw", left: float, top: float, right: float, bottom: float, fill: tuple[int, int, int]) -> None:
    ends = [round(left * _ZOOM), round(top * _ZOOM), round(right * _ZOOM) - 1, round(bottom * _ZOOM) - 1]
    draw.rectangle([ends[0], ends[1], max(ends[0], ends[2]), max(ends[1], ends[3])], fill=fill)


def _text(draw: "ImageDraw", x: float, y: float, words: str, anchor: str, fill: tuple[int, int, int]) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(11 * _ZOOM)
    draw.text((x * _ZOOM, y * _ZOOM), words, fill=fill, font=font, anchor=anchor)
