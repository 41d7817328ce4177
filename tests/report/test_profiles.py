"""Profiles and tracks: lines where the values are, broken where there are none, with chance and the peak marked."""

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mm.core.layer_table import LayerRow
from lightning_mm.report.figures import theme
from lightning_mm.report.figures.heatmap_parts import LayerAxis
from lightning_mm.report.figures.layers import panel_figure
from lightning_mm.report.figures.tracks import Track, panel_track
from lightning_mm.report.tables.panels import StepLabels, TrainedLayers, panels, subsample_steps
from tests.helpers.page import boxes, marks, points, texts

TRAINED = TrainedLayers((2, 3), 6)
NAMES = StepLabels({})


def panel_of(profile, measure="objects", steps=(0,), **rest):
    rows = []
    for step in steps:
        for layer, value in profile.items():
            why = "" if value is not None else "why"
            rows.append(LayerRow(step, "probing", measure, "last", layer, value, undefined=why, n=60, **rest))
    return panels(rows)[0]


def lines(drawn, color):
    return [line for line in marks(drawn.figure.svg(), "lines") if line.get("stroke") == color]


def center(symbol):
    """Where a symbol stands."""
    return tuple(map(float, re.match(r"translate\(([-\d.]+),([-\d.]+)\)", symbol.get("transform")).groups()))


def test_a_line_goes_through_its_values():
    profile = {-1: 0.5, 0: 0.6, 1: 0.9, 2: 0.7}
    drawing = panel_figure(panel_of(profile), TRAINED, NAMES)
    (line,) = lines(drawing, theme.INK)
    axis = LayerAxis.over([-1, 2], TRAINED)
    xs, ys = zip(*points(line), strict=True)
    assert ys == pytest.approx([axis.y(layer) for layer in profile], abs=0.1)
    told = list(zip(xs, profile.values(), strict=True))
    widths = [(b - a) / (v - u) for (a, u), (b, v) in pairwise(told)]
    assert widths == pytest.approx([widths[0]] * 3, rel=0.01)  # x is linear in the value; coordinates are tenths
    assert widths[0] > 0


def test_a_line_does_not_cross_a_layer_that_is_undefined():
    drawing = panel_figure(panel_of({0: 0.6, 1: 0.7, 2: None, 3: 0.8, 4: 0.9}), TRAINED, NAMES)
    assert [len(points(line)) for line in lines(drawing, theme.INK)] == [2, 2]


@pytest.mark.parametrize(("measure", "peak"), [("objects", 1), ("drift_overlap", 3)])
def test_the_ring_stands_at_what_counts(measure, peak):
    profile = {0: 0.6, 1: 0.9, 2: 0.7, 3: 0.2}
    drawing = panel_figure(panel_of(profile, measure), TRAINED, NAMES)
    (ring,) = marks(drawing.figure.svg(), "peak")
    assert center(ring)[1] == pytest.approx(LayerAxis.over([0, 3], TRAINED).y(peak), abs=0.1)
    assert texts(drawing.figure.svg(), "peak_number") == [str(peak)]
    assert drawing.legend[-1].value == f"{profile[peak]:.3g} at layer {peak}"


def test_a_flat_profile_has_no_peak():
    drawing = panel_figure(panel_of({0: 1.0, 1: 1.0}, "drift_overlap"), TRAINED, NAMES)
    assert marks(drawing.figure.svg(), "peak") == []
    assert drawing.legend[-1].value == ""


def test_interval_and_chance_enclose_what_they_are_about():
    drawing = panel_figure(
        panel_of({0: 0.6, 1: 0.7}, low=0.55, high=0.75, null=0.5, null_low=0.45, null_high=0.52), TRAINED, NAMES
    )
    (line,) = lines(drawing, theme.INK)

    svg = drawing.figure.svg()

    def ends(style):
        (area,) = marks(svg, style)
        xs = [x for x, _ in points(area)]
        return min(xs), max(xs)

    (low, high), (null_low, null_high), null = ends("interval"), ends("null_band"), center(marks(svg, "null")[0])[0]
    assert low < min(x for x, _ in points(line)) <= max(x for x, _ in points(line)) < high
    assert null_low < null < null_high < low


def test_three_steps_stand_for_many_and_the_rest_is_said():
    panel = panel_of({0: 0.6, 1: 0.7}, steps=range(0, 400, 10))
    drawing = panel_figure(panel, TRAINED, NAMES)
    assert [key.label for key in drawing.legend] == ["step 0", "step 200", "step 390"]
    assert drawing.note == "16 steps in between are left out of the drawing."
    assert len({key.style for key in drawing.legend}) > 2  # told apart


def test_labels_stand_for_steps_by_their_letter():
    panel = panel_of({0: 0.6, 1: 0.7}, steps=(0, 1))
    drawing = panel_figure(panel, TRAINED, StepLabels({0: "runs/a", 1: "runs/b"}))
    assert [key.label for key in drawing.legend] == ["A", "B"]
    alone = panel_figure(panel_of({0: 0.6, 1: 0.7}, steps=(1,)), TRAINED, StepLabels({0: "runs/a", 1: "runs/b"}))
    assert [key.label for key in alone.legend] == ["B"]
    assert "layer 1: 0.7, N 60, runs/b" in [t.text for t in ET.fromstring(drawing.figure.svg()).iter("title")]


def test_the_measure_without_the_picture_is_a_line_of_its_own():
    withheld = panel_of({0: 0.5, 1: 0.52}, "objects/text_only")
    drawing = panel_figure(panel_of({0: 0.6, 1: 0.7}), TRAINED, NAMES, withheld)
    assert len(lines(drawing, theme.WITHHELD)) == 1
    assert drawing.legend[-1].label == "without the picture"


values = st.none() | st.floats(-1e90, 1e90)


@settings(max_examples=60, deadline=None)  # each example is rendered
@given(
    st.dictionaries(st.integers(-1, 120), values, min_size=1, max_size=15).filter(
        lambda p: any(v is not None for v in p.values())
    ),
    st.sampled_from(["objects", "drift_overlap", "id_gride", "<b>&"]),
    st.lists(values, min_size=5, max_size=5),
)
def test_any_profile_is_well_formed_and_inside_the_drawing(profile, measure, ends):
    keys = ("low", "high", "null", "null_low", "null_high")
    panel = panel_of(profile, measure, steps=(0, 7), **dict(zip(keys, ends, strict=True)))
    drawing = panel_figure(panel, TRAINED, NAMES)
    for line in marks(drawing.figure.svg(), "lines"):
        assert all(0 <= x <= 360 for x, _ in points(line))
    ET.fromstring(panel_track(panel, Track(-1, 120, TRAINED.layers)).svg())


def bars(figure, name, color=None):
    """(left, top, width, height) of the boxes of a track, in columns of 10 pixels, from left to right."""
    return sorted(box for path in marks(figure.svg(), name) if color in (None, path.get("fill")) for box in boxes(path))


def test_a_track_has_one_bar_per_layer_and_stands_on_chance():
    track = panel_track(panel_of({-1: None, 0: 0.4, 1: 0.9, 2: 0.7}, null=0.5), Track(-1, 5, TRAINED.layers))
    assert len(bars(track, "undefined")) == 1
    ((left, *_),) = bars(track, "bars", theme.BAR_PEAK)
    assert left == pytest.approx(21.2)
    (_, below, _, _), (_, above, _, height) = bars(track, "bars", theme.BAR)
    assert below > above  # 0.4 hangs below chance, 0.7 stands on it
    assert above + height == pytest.approx(below, abs=0.11)
    assert [left for left, *_ in bars(track, "trained")] == pytest.approx([30, 40], abs=0.11)


def test_what_moved_hangs_from_the_start():
    rows = panel_of({0: 1.0, 1: 0.9, 2: 0.4}, "drift_overlap", steps=(5,))
    track = panel_track(rows, Track(0, 2, ()))
    ((_, peak_top, _, longest),) = bars(track, "bars", theme.BAR_PEAK)
    others = bars(track, "bars", theme.BAR)
    assert [top for _, top, _, _ in others] + [peak_top] == pytest.approx([2, 2, 2], abs=0.01)
    assert longest > max(height for *_, height in others)
    assert min(height for *_, height in others) > 0.5  # no change still shows as a line


def test_a_strip_fills_the_layers_that_belong():
    strip = Track(-1, 5, ()).membership([2, 3])
    assert [left for left, *_ in bars(strip, "layers", theme.TEAL)] == pytest.approx([31, 41])
    assert len(bars(strip, "layers", theme.QUIET)) == 4


def test_a_track_shows_the_step_before_and_the_interval():
    figure = Track(0, 2, ()).bars({0: 0.2, 1: 0.4}, {0: 0.1, 1: None}, 0.0, 1, spread={0: (0.1, 0.3), 1: (None, 0.5)})
    svg = figure.svg()
    (before,), (spread,) = marks(svg, "before"), marks(svg, "spread")
    assert float(before.get("x2")) == pytest.approx(10)  # as wide as a column
    assert abs(float(spread.get("y2"))) == pytest.approx(36 * 0.2 / 0.4, abs=0.1)
    assert 'preserveAspectRatio="none"' in svg


@given(st.integers(1, 400), st.integers(2, 30))
def test_thinning_keeps_both_ends_and_the_order(count, most):
    steps = [3 * i for i in range(count)]
    kept = subsample_steps(steps, most)
    assert len(kept) <= max(2, most)
    assert len(set(kept)) == len(kept)
    assert list(kept) == sorted(kept)
    assert {steps[0], steps[-1]} <= set(kept) <= set(steps)


def test_a_far_chance_does_not_dwarf_a_shape():
    panel = panel_of({0: 8.0, 1: 9.0, 2: 8.5}, "id_gride", null=75.0)
    track = panel_track(panel, Track(0, 2, ()))
    heights = [height for *_, height in bars(track, "bars")]
    assert max(heights) > 3 * min(heights)
    assert marks(track.svg(), "null") == []
    drawing = panel_figure(panel, TRAINED, NAMES)
    xs = [x for x, _ in points(lines(drawing, theme.INK)[0])]
    assert max(xs) - min(xs) > 200
    assert marks(drawing.figure.svg(), "null") == []
