"""Profiles and tracks: lines where the values are, broken where there are none, with chance and the peak marked."""

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mm.core.layer_table import LayerRow
from lightning_mm.report.figures import profiles
from lightning_mm.report.figures.layer_axis import LayerAxis
from lightning_mm.report.figures.tracks import Track, panel_track
from lightning_mm.report.tables.panels import StepLabels, TrainedLayers, panels, subsample_steps

TRAINED = TrainedLayers((2, 3), 6)
NAMES = StepLabels({})


def panel_of(profile, measure="objects", steps=(0,), **rest):
    rows = []
    for step in steps:
        for layer, value in profile.items():
            why = "" if value is not None else "why"
            rows.append(LayerRow(step, "probing", measure, "last", layer, value, undefined=why, n=60, **rest))
    return panels(rows)[0]


def parts(drawing, tag, style):
    return [e for e in ET.fromstring(drawing.svg).iter(tag) if style in e.get("class", "").split()]


def points(line):
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


def test_a_line_goes_through_its_values():
    profile = {-1: 0.5, 0: 0.6, 1: 0.9, 2: 0.7}
    drawing = profiles.draw(panel_of(profile), TRAINED, NAMES)
    (line,) = parts(drawing, "polyline", "ink")
    axis = LayerAxis.over([-1, 2], TRAINED)
    xs, ys = zip(*points(line), strict=True)
    assert ys == pytest.approx([axis.y(layer) for layer in profile], abs=0.1)
    told = list(zip(xs, profile.values(), strict=True))
    widths = [(b - a) / (v - u) for (a, u), (b, v) in pairwise(told)]
    assert widths == pytest.approx([widths[0]] * 3, rel=0.01)  # x is linear in the value; coordinates are tenths
    assert widths[0] > 0


def test_a_line_does_not_cross_a_layer_that_is_undefined():
    drawing = profiles.draw(panel_of({0: 0.6, 1: 0.7, 2: None, 3: 0.8, 4: 0.9}), TRAINED, NAMES)
    assert [len(points(line)) for line in parts(drawing, "polyline", "ink")] == [2, 2]


@pytest.mark.parametrize(("measure", "peak"), [("objects", 1), ("drift_overlap", 3)])
def test_the_ring_stands_at_what_counts(measure, peak):
    profile = {0: 0.6, 1: 0.9, 2: 0.7, 3: 0.2}
    drawing = profiles.draw(panel_of(profile, measure), TRAINED, NAMES)
    (ring,) = parts(drawing, "circle", "peak")
    assert float(ring.get("cy")) == pytest.approx(LayerAxis.over([0, 3], TRAINED).y(peak), abs=0.1)
    assert [text.text for text in parts(drawing, "text", "peak-number")] == [str(peak)]
    assert drawing.keys[-1].last == f"{profile[peak]:.3g} at layer {peak}"


def test_a_flat_profile_has_no_peak():
    drawing = profiles.draw(panel_of({0: 1.0, 1: 1.0}, "drift_overlap"), TRAINED, NAMES)
    assert parts(drawing, "circle", "peak") == []
    assert drawing.keys[-1].last == ""


def test_interval_and_chance_enclose_what_they_are_about():
    drawing = profiles.draw(
        panel_of({0: 0.6, 1: 0.7}, low=0.55, high=0.75, null=0.5, null_low=0.45, null_high=0.52), TRAINED, NAMES
    )
    (line,) = parts(drawing, "polyline", "ink")

    def ends(style):
        (area,) = parts(drawing, "path", style)
        xs = [float(x) for x in re.findall(r"[ML]([-\d.]+) ", area.get("d"))]
        return min(xs), max(xs)

    (low, high), (null_low, null_high), null = ends("interval"), ends("null-band"), ends("chance")[0]
    assert low < min(x for x, _ in points(line)) <= max(x for x, _ in points(line)) < high
    assert null_low < null < null_high < low


def test_three_steps_stand_for_many_and_the_rest_is_said():
    panel = panel_of({0: 0.6, 1: 0.7}, steps=range(0, 400, 10))
    drawing = profiles.draw(panel, TRAINED, NAMES)
    assert [key.label for key in drawing.keys] == ["step 0", "step 200", "step 390"]
    assert drawing.note == "16 steps in between are left out of the drawing."
    assert len({key.dash for key in drawing.keys[:2]} | {key.style for key in drawing.keys}) > 2  # told apart


def test_labels_stand_for_steps_by_their_letter():
    panel = panel_of({0: 0.6, 1: 0.7}, steps=(0, 1))
    drawing = profiles.draw(panel, TRAINED, StepLabels({0: "runs/a", 1: "runs/b"}))
    assert [key.label for key in drawing.keys] == ["A", "B"]
    alone = profiles.draw(panel_of({0: 0.6, 1: 0.7}, steps=(1,)), TRAINED, StepLabels({0: "runs/a", 1: "runs/b"}))
    assert [key.label for key in alone.keys] == ["B"]
    assert "layer 1: 0.7, N 60, runs/b" in [t.text for t in ET.fromstring(drawing.svg).iter("title")]


def test_the_measure_without_the_picture_is_a_line_of_its_own():
    blind = panel_of({0: 0.5, 1: 0.52}, "objects/text_only")
    drawing = profiles.draw(panel_of({0: 0.6, 1: 0.7}), TRAINED, NAMES, blind)
    assert len(parts(drawing, "polyline", "blind")) == 1
    assert drawing.keys[-1].label == "without the picture"


values = st.none() | st.floats(-1e90, 1e90)


@settings(max_examples=60)
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
    drawing = profiles.draw(panel, TRAINED, NAMES)
    for line in ET.fromstring(drawing.svg).iter("polyline"):
        assert all(0 <= x <= 360 for x, _ in points(line))
    ET.fromstring(panel_track(panel, Track(-1, 120, TRAINED.layers)))


def bars(svg, style):
    return [e for e in ET.fromstring(svg).iter("rect") if e.get("class") == style]


def test_a_track_has_one_bar_per_layer_and_stands_on_chance():
    track = Track(-1, 5, TRAINED.layers)
    svg = panel_track(panel_of({-1: None, 0: 0.4, 1: 0.9, 2: 0.7}, null=0.5), track)
    assert len(bars(svg, "void")) == 1
    (peak,) = bars(svg, "bar-peak")
    assert float(peak.get("x")) == pytest.approx(2.12)
    below, above = (float(bar.get("y")) for bar in bars(svg, "bar-value"))
    assert below > above  # 0.4 hangs below chance, 0.7 stands on it
    assert above + float(bars(svg, "bar-value")[1].get("height")) == pytest.approx(below, abs=0.11)
    bands = [float(e.get("x")) for e in bars(svg, "trained-band")]
    assert bands == [3, 4]


def test_what_moved_hangs_from_the_start():
    rows = panel_of({0: 1.0, 1: 0.9, 2: 0.4}, "drift_overlap", steps=(5,))
    svg = panel_track(rows, Track(0, 2, ()))
    (longest,) = bars(svg, "bar-peak")
    heights = [float(bar.get("height")) for bar in bars(svg, "bar-value")]
    assert all(float(bar.get("y")) == pytest.approx(2) for bar in [*bars(svg, "bar-value"), longest])
    assert float(longest.get("height")) > max(heights)


def test_a_strip_fills_the_layers_that_belong():
    svg = Track(-1, 5, ()).strip([2, 3])
    assert [float(e.get("x")) for e in bars(svg, "in")] == [3.1, 4.1]
    assert len(bars(svg, "out")) == 4


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
    svg = panel_track(panel, Track(0, 2, ()))
    heights = [float(bar.get("height")) for bar in [*bars(svg, "bar-value"), *bars(svg, "bar-peak")]]
    assert max(heights) > 3 * min(heights)
    assert "chance" not in svg
    drawing = profiles.draw(panel, TRAINED, NAMES)
    xs = [x for x, _ in points(parts(drawing, "polyline", "ink")[0])]
    assert max(xs) - min(xs) > 200
    assert parts(drawing, "path", "chance") == []
