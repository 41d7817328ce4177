"""Heat maps: every cell where its layer and step are, as strong as its value; what is undefined is hatched and said."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mm.core.layer_table import LayerRow
from lightning_mm.report.figures import heatmaps
from lightning_mm.report.figures.heatmaps import Scale
from lightning_mm.report.figures.layer_axis import LayerAxis
from lightning_mm.report.tables.panels import StepLabels, TrainedLayers, panels

TRAINED = TrainedLayers((2, 3), 6)
TEAL = ("trained-bar", "trained-edge")


def panel_of(values, measure="cka", **rest):
    """A panel of {(step, layer): value}."""
    rows = [
        LayerRow(s, "geometry", measure, "last", i, v, undefined="" if v is not None else "why")
        for (s, i), v in values.items()
    ]
    return panels([LayerRow(**{**row.__dict__, **rest}) for row in rows])[0]


def drawn(panel, trained=TRAINED, labels=None):
    """The elements of a heat map from 100 to 200."""
    axis = LayerAxis.over(panel.layers, trained)
    body = heatmaps.heat_map(panel, axis, panel.steps, StepLabels(labels or {}), 100, 200, tips=True)
    return ET.fromstring(f"<svg>{body}</svg>"), axis


def cells(root):
    """(left, top, level, words) of each cell that says its value."""
    found = []
    for path in root.iter("path"):
        if re.fullmatch(r"q\d+", path.get("class")):
            left, top = map(float, re.match(r"M([-\d.]+) ([-\d.]+)", path.get("d")).groups())
            found.append((left, top, int(path.get("class")[1:]), path.find("title").text))
    return found


def test_later_steps_stand_right_and_higher_layers_up():
    panel = panel_of({(s, i): s + i / 10 for s in (0, 5, 50) for i in range(-1, 6)})
    root, axis = drawn(panel)
    by_words = {words: (left, top) for left, top, _, words in cells(root)}
    assert len(by_words) == 21
    lefts = [by_words[f"layer 3, step {step}: {step + 0.3:.3g}"][0] for step in (0, 5, 50)]
    assert lefts == pytest.approx([100, 133.3, 166.7], abs=0.1)
    tops = [by_words[f"{'embeddings' if i < 0 else f'layer {i}'}, step 5: {5 + i / 10:.3g}"][1] for i in range(-1, 6)]
    assert tops == sorted(tops, reverse=True)
    assert tops[-1] == pytest.approx(axis.top)
    assert tops[0] == pytest.approx(axis.bottom - axis.row, abs=0.1)


@given(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=12))
def test_stronger_colors_are_higher_values(values):
    panel = panel_of({(0, i): value for i, value in enumerate(values)})
    levels = [level for _, _, level, _ in cells(drawn(panel)[0])]
    for a, first in zip(values, levels, strict=True):
        for b, second in zip(values, levels, strict=True):
            assert a > b or first <= second


def test_where_the_lowest_counts_it_has_the_strongest_colour():
    panel = panel_of({(0, 0): 1.0, (0, 1): 0.4}, "drift_overlap")
    levels = [level for _, _, level, _ in cells(drawn(panel)[0])]
    assert levels == [0, 23]
    texts = [text.text for text in drawn(panel)[0].iter("text")]
    assert texts[-2:] == ["1", "0.4"]  # the scale's ends, palest first


def test_noise_within_the_intervals_does_not_look_like_change():
    values = {(0, i): 0.5 + 0.01 * (i % 2) for i in range(6)}
    calm = panel_of(values, low=0.4, high=0.6)
    bold = panel_of(values)
    spread = [max(x) - min(x) for x in ([c[2] for c in cells(drawn(p)[0])] for p in (calm, bold))]
    assert spread == [pytest.approx(1, abs=1), 23]


def test_chance_is_on_the_scale():
    scale = Scale.of(panel_of({(0, 0): 0.7, (0, 1): 0.9}, null=0.5), [0])
    assert (scale.low, scale.null, scale.high) == (0.5, 0.5, 0.9)
    root, _ = drawn(panel_of({(0, 0): 0.7, (0, 1): 0.9}, null=0.5))
    (mark,) = [path for path in root.iter("path") if path.get("class") == "chance"]
    assert mark.get("d").startswith("M100.0 ")
    assert mark.find("title").text == "chance: 0.5"


def test_undefined_cells_are_hatched_within_their_bounds_and_missing_ones_are_empty():
    panel = panel_of({(0, 0): 0.1, (0, 1): None, (9, 0): 0.3})
    root, axis = drawn(panel)
    assert len(cells(root)) == 2
    (box,) = [path for path in root.iter("path") if path.get("class") == "none"]
    assert box.find("title").text.startswith("undefined")
    (hatch,) = [path for path in root.iter("path") if path.get("class") == "hatch"]
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", hatch.get("d"))]
    assert len(points) >= 4
    for x, y in points:  # coordinates are rounded to a tenth
        assert 99.9 <= x <= 150.1
        assert axis.y(1) - axis.row / 2 - 0.1 <= y <= axis.y(1) + axis.row / 2 + 0.1
    for (a, b), (c, d) in zip(points[::2], points[1::2], strict=True):
        assert abs((a - c) + (b - d)) < 0.21  # each line is a diagonal


def test_the_trained_layers_are_marked_where_they_are():
    axis = LayerAxis.over([-1, 5], TrainedLayers((0, 2, 3), 6))
    bars = ET.fromstring(f"<svg>{axis.bars(10)}</svg>").findall("rect")
    spans = sorted((float(r.get("y")), float(r.get("y")) + float(r.get("height"))) for r in bars)
    assert spans == [
        (pytest.approx(axis.y(3.5), abs=0.1), pytest.approx(axis.y(1.5), abs=0.1)),
        (pytest.approx(axis.y(0.5), abs=0.1), pytest.approx(axis.y(-0.5), abs=0.1)),
    ]
    assert {0, 2, 3} <= set(LayerAxis.over([-1, 5], TrainedLayers((0, 2, 3), 6)).numbered)


@pytest.mark.parametrize("total", [1, 2, 6, 30, 80, 300])
def test_printed_layer_numbers_do_not_touch(total):
    axis = LayerAxis.over([-1, total - 1], TrainedLayers(tuple(range(total // 4, total // 2)), total))
    assert axis.bottom - axis.top <= 240.001
    ys = sorted(axis.y(layer) for layer in axis.numbered)
    assert all(b - a >= 13 for a, b in pairwise(ys))
    assert len(ys) >= 2


def test_a_matrix_has_its_origin_at_the_lower_left_and_marks_both_axes():
    layers = [-1, 0, 1, 2, 3, 4, 5]
    values = [[1.0 if a == b else 0.1 if a > b else 0.5 for b in layers] for a in layers]
    values[0][6] = None
    root = ET.fromstring(heatmaps.matrix(layers, values, TRAINED, tips=True))
    found = {words: (left, top) for left, top, _, words in cells(root)}
    assert len(found) == 48
    lower, upper = found["layer 0 and layer 0: 1"], found["layer 5 and layer 5: 1"]
    assert lower[0] < upper[0]
    assert lower[1] > upper[1]
    assert found["layer 5 and embeddings: 0.1"][0] < found["layer 4 and layer 5: 0.5"][0]
    bars = [r for r in root.iter("rect") if r.get("class") == "trained-bar"]
    widths = sorted((float(r.get("width")), float(r.get("height"))) for r in bars)
    assert widths == [(4, pytest.approx(28, abs=0.1)), (pytest.approx(28, abs=0.1), 4)]  # two rows of 14, either way
    assert [p for p in root.iter("path") if p.get("class") == "hatch"]


def test_without_tips_cells_of_one_colour_are_one_shape():
    layers = list(range(-1, 30))
    values = [[math.exp(-abs(a - b) / 9) for b in layers] for a in layers]
    with_tips, without = (heatmaps.matrix(layers, values, TRAINED, tips=tips) for tips in (True, False))
    assert len(without) < len(with_tips) / 3
    root = ET.fromstring(without)
    boxes = [path.get("d").count("M") for path in root.iter("path") if path.get("class").startswith("q")]
    assert sum(boxes) == 961
    assert len(boxes) <= 24


@settings(max_examples=40)
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
    root, _ = drawn(panel, labels={min(panel.steps): "<script>"})
    for left, _, level, _ in cells(root):
        assert 99.9 <= left <= 200
        assert 0 <= level < 24
