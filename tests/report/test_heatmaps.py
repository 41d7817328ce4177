"""Heat maps: every cell where its layer and step are, as strong as its value; what is undefined is hatched and said."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mm.core.layer_table import LayerRow
from lightning_mm.report.figures import theme
from lightning_mm.report.figures.class_maps import class_maps
from lightning_mm.report.figures.curves import Series, line_chart
from lightning_mm.report.figures.figure import Figure
from lightning_mm.report.figures.heatmap_parts import ColorScale, LayerAxis
from lightning_mm.report.figures.layers import heat_map, panel_figure
from lightning_mm.report.figures.matrices import matrix_figure
from lightning_mm.report.figures.trace_maps import trace_map
from lightning_mm.report.figures.tracks import Track
from lightning_mm.report.tables.panels import StepLabels, TrainedLayers, panels
from lightning_mm.report.tables.traces import Trace
from tests.helpers import page
from tests.helpers.causal_files import trace_of, traced_rows
from tests.helpers.page import boxes, marks, texts

TRAINED = TrainedLayers((2, 3), 6)


def panel_of(values, measure="cka", **rest):
    """A panel of {(step, layer): value}."""
    rows = [
        LayerRow(s, "geometry", measure, "last", i, v, undefined="" if v is not None else "why")
        for (s, i), v in values.items()
    ]
    return panels([LayerRow(**{**row.__dict__, **rest}) for row in rows])[0]


def drawn(panel, trained=TRAINED, labels=None):
    """A heat map 100 pixels wide."""
    axis = LayerAxis.over(panel.layers, trained)
    chart, data = heat_map(panel, axis, panel.steps, StepLabels(labels or {}), width=100)
    return Figure(chart, data, (100, 300), (0, 0), "").svg(), axis


def cells(svg):
    return page.cells(svg, theme.SEQUENTIAL)


def levels_of(panel):
    """The colors of a panel with one step, from the lowest layer up."""
    return [level for _, _, level in sorted(cells(drawn(panel)[0]).values(), key=lambda cell: -cell[1])]


def test_later_steps_stand_right_and_higher_layers_up():
    panel = panel_of({(s, i): s + i / 10 for s in (0, 5, 50) for i in range(-1, 6)})
    svg, axis = drawn(panel)
    by_words = {words: (left, top) for words, (left, top, _) in cells(svg).items()}
    assert len(by_words) == 21
    lefts = [by_words[f"layer 3, step {step}: {step + 0.3:.3g}"][0] for step in (0, 5, 50)]
    # a true axis: columns meet halfway between steps, and the outer ones reach as far out as in: -2.5, 2.5, 27.5, 72.5
    assert lefts == pytest.approx([0, 100 * 5 / 75, 100 * 30 / 75], abs=0.1)
    tops = [by_words[f"{'embeddings' if i < 0 else f'layer {i}'}, step 5: {5 + i / 10:.3g}"][1] for i in range(-1, 6)]
    assert tops == sorted(tops, reverse=True)
    assert tops[-1] == pytest.approx(0)
    assert tops[0] == pytest.approx(axis.height - axis.row, abs=0.1)


@settings(max_examples=40, deadline=None)  # each example is rendered
@given(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=12))
def test_stronger_colors_are_higher_values(values):
    panel = panel_of({(0, i): value for i, value in enumerate(values)})
    levels = levels_of(panel)
    for a, first in zip(values, levels, strict=True):
        for b, second in zip(values, levels, strict=True):
            assert a > b or first <= second


def test_where_the_lowest_counts_it_has_the_strongest_colour():
    panel = panel_of({(0, 0): 1.0, (0, 1): 0.4}, "drift_overlap")
    levels = levels_of(panel)
    assert levels == [0, 23]
    assert texts(drawn(panel)[0], "scale_ends") == ["1", "0.4"]  # palest first


def test_noise_within_the_intervals_does_not_look_like_change():
    values = {(0, i): 0.5 + 0.01 * (i % 2) for i in range(6)}
    calm = panel_of(values, low=0.4, high=0.6)
    bold = panel_of(values)
    spread = [max(levels) - min(levels) for levels in map(levels_of, (calm, bold))]
    assert spread == [pytest.approx(1, abs=1), 23]


def test_chance_is_on_the_scale():
    panel = panel_of({(0, 0): 0.7, (0, 1): 0.9}, null=0.5)
    scale = ColorScale.of(panel, [0])
    assert (scale.low, scale.null, scale.high) == (0.5, 0.5, 0.9)
    (mark,) = marks(drawn(panel)[0], "scale_null")
    assert mark.get("transform").startswith("translate(0,")
    assert mark.find("title").text == "chance: 0.5"


def test_undefined_cells_are_hatched_and_missing_ones_are_empty():
    panel = panel_of({(0, 0): 0.1, (0, 1): None, (9, 0): 0.3})
    svg, axis = drawn(panel)
    assert len(cells(svg)) == 2
    (cell,) = marks(svg, "undefined")
    assert cell.find("title").text.startswith("undefined")
    (box,) = boxes(cell)
    assert box == pytest.approx((0, axis.y(1) - axis.row / 2, 50, axis.row), abs=0.1)
    (hatch,) = marks(svg, "hatch")  # a diagonal of the cell
    x, y = map(float, re.match(r"translate\(([-\d.]+),([-\d.]+)\)", hatch.get("transform")).groups())
    ends = [(x, y), (x + float(hatch.get("x2")), y + float(hatch.get("y2")))]
    corners = [(box[0], box[1] + box[3]), (box[0] + box[2], box[1])]
    assert sorted(ends) == [pytest.approx(corner, abs=0.1) for corner in corners]


def test_the_trained_layers_are_marked_where_they_are():
    trained = TrainedLayers((0, 2, 3), 6)
    svg, axis = drawn(panel_of({(0, i): 0.1 * i for i in range(-1, 6)}), trained)
    spans = sorted((top, top + height) for bar in marks(svg, "trained_bar") for _, top, _, height in rounded(bar))
    assert spans == [
        (pytest.approx(axis.y(3.5), abs=0.1), pytest.approx(axis.y(1.5), abs=0.1)),
        (pytest.approx(axis.y(0.5), abs=0.1), pytest.approx(axis.y(-0.5), abs=0.1)),
    ]
    assert {0, 2, 3} <= set(axis.numbered)
    labels = [text for text in ET.fromstring(svg).iter("text") if text.get("fill") == theme.TEAL]
    assert [(text.text, text.get("font-weight")) for text in labels] == [(str(i), "bold") for i in (0, 2, 3)]


def rounded(path):
    """(left, top, width, height) of a rectangle with rounded corners."""
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d").split("C")[0])]
    corners = [tuple(map(float, pair)) for pair in re.findall(r"([-\d.]+),([-\d.]+)", path.get("d"))]
    xs, ys = zip(*corners, strict=True)
    assert numbers
    return [(min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))]


@pytest.mark.parametrize("total", [1, 2, 6, 30, 80, 300])
def test_printed_layer_numbers_do_not_touch(total):
    axis = LayerAxis.over([-1, total - 1], TrainedLayers(tuple(range(total // 4, total // 2)), total))
    assert axis.height <= 240.001
    ys = sorted(axis.y(layer) for layer in axis.numbered)
    assert all(b - a >= 13 for a, b in pairwise(ys))
    assert len(ys) >= 2


def test_a_matrix_has_its_origin_at_the_lower_left_and_marks_both_axes():
    layers = [-1, 0, 1, 2, 3, 4, 5]
    values = [[1.0 if a == b else 0.1 if a > b else 0.5 for b in layers] for a in layers]
    values[0][6] = None
    svg = matrix_figure(layers, values, TRAINED, tips=True).svg()
    found = {words: (left, top) for words, (left, top, _) in cells(svg).items()}
    assert len(found) == 48
    lower, upper = found["layer 0 and layer 0: 1"], found["layer 5 and layer 5: 1"]
    assert lower[0] < upper[0]
    assert lower[1] > upper[1]
    assert found["layer 5 and embeddings: 0.1"][0] < found["layer 4 and layer 5: 0.5"][0]
    bars = [*marks(svg, "trained_bar"), *marks(svg, "trained_below")]
    sizes = sorted((width, height) for bar in bars for _, _, width, height in rounded(bar))
    assert sizes == [(4, pytest.approx(28, abs=0.1)), (pytest.approx(28, abs=0.1), 4)]  # two rows of 14, either way
    assert len(marks(svg, "hatch")) == 1


def test_without_tips_cells_of_one_color_are_one_shape():
    layers = list(range(-1, 30))
    values = [[math.exp(-abs(a - b) / 9) for b in layers] for a in layers]
    with_tips, without = (matrix_figure(layers, values, TRAINED, tips=tips).svg() for tips in (True, False))
    assert len(marks(with_tips, "cells")) == 961
    assert len(with_tips) - len(without) > 70_000
    shapes = [len(boxes(path)) for path in marks(without, "cells")]
    assert sum(shapes) == 961
    assert len(shapes) <= 24


def others():
    """A figure of each kind that is not over steps or pairs of layers."""
    line = line_chart("Loss", "", [Series("a", [(0, 1.0), (1, 2.0)])])
    track = Track(0, 2, [1]).bars({0: 0.2, 1: None}, {0: 0.1}, 0.0, 0, null=0.1, spread={0: (0.1, 0.3)})
    traced = trace_map(Trace.of(trace_of()), TRAINED, headed=True)
    return line.figure, track, Track(0, 2, [1]).membership([1]), traced, class_maps(traced_rows())[0].figure(TRAINED)


def test_every_figure_is_valid_vega_lite():
    """Figures are built without validation, which is slow; here it is made up for."""
    panel = panel_of({(s, i): None if i < 0 else s + i for s in (0, 5) for i in range(-1, 6)}, low=0, high=9, null=1)
    square = matrix_figure([0, 1], [[1, 0], [0, None]], TRAINED, tips=True)
    for figure in (panel_figure(panel, TRAINED, StepLabels({})).figure, square, *others()):
        spec = figure.chart.to_dict(validate=True)
        assert spec["$schema"].startswith("https://vega.github.io/schema/vega-lite/v6")


@settings(max_examples=40, deadline=None)  # each example is rendered
@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12),
    st.dictionaries(
        st.tuples(st.integers(0, 10**9), st.integers(-1, 200)),
        st.none() | st.floats(-1e90, 1e90),
        min_size=1,
        max_size=20,
    ),
)
def test_any_panel_is_well_formed_and_inside_its_frame(name, values):
    panel = panel_of(values, measure=f"<{name}>&\"'")
    svg, _ = drawn(panel, labels={min(panel.steps): "<script>"})
    for left, _, level in cells(svg).values():
        assert -0.1 <= left <= 100
        assert 0 <= level < 24
