"""Charts: the drawing shows the data where it is, keeps its spikes, and is well-formed XML whatever the labels hold."""

import math
import re
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mm.report.figures.curves import Series, line_chart, running_mean, thin
from lightning_mm.report.tables.numbers import percent, short
from tests.helpers.page import marks, points

values = st.floats(-1e12, 1e12)
series = st.lists(st.tuples(st.integers(0, 10**6).map(float), values), min_size=1, max_size=60).map(sorted)


def drawn(chart, index=-1):
    return points(marks(chart.figure.svg(), "lines")[index])


def labels(chart):
    """The numbers of the vertical axis, from the bottom, and where they stand."""
    axes = [g for g in ET.fromstring(chart.figure.svg()).iter("g") if "role-axis-label" in g.get("class", "")]
    found = [(text.text, text.get("transform")) for axis in axes for text in axis if text.get("text-anchor") == "end"]
    return [
        (text, float(place.rstrip(")").split(",")[1])) for text, place in found if place.startswith("translate(-7,")
    ]


@settings(max_examples=40, deadline=None)  # each example is rendered
@given(series, st.text(max_size=20).map(lambda s: "".join(c for c in s if c.isprintable())))
def test_any_series_draws_inside_the_frame_as_well_formed_xml(data, label):
    chart = line_chart(f"<{label}>", "unit", [Series(label + "<&>\"'", data)])
    assert chart is not None
    for x, y in drawn(chart):
        assert 0 <= x <= 300
        assert 0 <= y <= 154


def test_higher_values_stand_higher_and_later_steps_further_right():
    chart = line_chart("Loss", "nats", [Series("train", [(0, 3.0), (10, 1.0), (20, 2.0)])])
    (x0, y0), (x1, y1), (x2, y2) = drawn(chart)
    assert x0 < x1 < x2
    assert y0 < y2 < y1  # the vertical axis of SVG points down
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # coordinates are rounded to a tenth
    assert y1 - y0 == pytest.approx(2 * (y1 - y2), abs=0.3)


def test_shares_stand_on_a_fixed_axis():
    low, high = (line_chart("x", "", [Series("a", [(0, 0.0), (1, top)])], share=True) for top in (0.5, 1.0))
    assert drawn(low)[1][1] == pytest.approx(77, abs=0.1)  # halfway between 154 (0 %) and 0 (100 %)
    assert drawn(high)[1][1] == pytest.approx(0, abs=0.1)
    assert low.legend[0].value == "50\u00a0%"


def test_values_that_are_not_finite_are_counted_and_not_drawn():
    chart = line_chart("Loss", "", [Series("train", [(0, 1.0), (5, math.nan), (10, math.inf), (15, 2.0)])])
    assert len(drawn(chart)) == 2
    assert chart.note.startswith("2 values are not finite")
    assert "step 5" in chart.note


def test_no_data_is_no_chart():
    assert line_chart("Loss", "", [Series("a", []), Series("b", [(1, math.nan)])]) is None


def test_a_zero_axis_begins_at_zero():
    chart = line_chart("Speed", "", [Series("a", [(0, 600.0), (1, 640.0)])], zero=True)
    assert labels(chart)[0] == ("0", pytest.approx(154 + 3, abs=1))  # the baseline of a number is below its rule


@settings(max_examples=25)  # long lists are slow to draw
@given(st.lists(values, min_size=241, max_size=500))
def test_thinning_keeps_the_extremes_and_the_end(ys):
    data = [(float(i), y) for i, y in enumerate(ys)]
    kept = thin(data)
    assert len(kept) <= 242
    assert set(kept) <= set(data)
    assert kept == sorted(kept)
    assert {min(ys), max(ys)} <= {y for _, y in kept}
    assert kept[-1] == data[-1]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.integers(1, 12))
def test_the_running_mean_is_numpys(ys, window):
    ours = running_mean([(float(i), y) for i, y in enumerate(ys)], window)
    for i, (_, mean) in enumerate(ours):
        # float64 sums of at most 12 numbers below 1e6: rounding stays below 1e-8
        assert mean == pytest.approx(np.mean(ys[max(0, i - window + 1) : i + 1]), abs=1e-8)


def test_the_running_mean_forgets_a_spike_and_takes_time_as_the_points():
    ys = [1.0] * 10 + [1e30] + [1.0] * 20_000
    means = [mean for _, mean in running_mean([(float(i), y) for i, y in enumerate(ys)], 800)]
    assert means[9:11] == [1.0, pytest.approx(1e30 / 11)]
    assert set(means[811:]) == {1.0}
    start = time.process_time()
    running_mean([(float(i), 1.0) for i in range(200_000)], 8_000)
    assert time.process_time() - start < 5, "a sum per point and window would take minutes"


@settings(max_examples=40, deadline=None)  # each example is rendered
@given(values, values)
def test_the_axis_is_round_even_and_encloses(a, b):
    chart = line_chart("Loss", "", [Series("a", [(0.0, a), (1.0, b)])])
    places = [place for _, place in labels(chart)]
    assert 2 <= len(places) <= 8
    assert places[0] == pytest.approx(154 + 3, abs=1)  # the lowest number stands at the lower edge, below all values
    assert places[-1] == pytest.approx(0 + 3, abs=1)
    np.testing.assert_allclose(np.diff(places), np.diff(places).mean(), atol=0.02)  # hundredths of a pixel
    assert all(len(text) <= 10 for text, _ in labels(chart))


@pytest.mark.parametrize(
    ("value", "text"), [(2e-4, "2e-4"), (1.5, "1.5"), (12_000, "12k"), (800, "800"), (4e6, "4M"), (2e9, "2e+9")]
)
def test_the_axis_writes_short_numbers(value, text):
    chart = line_chart("Loss", "", [Series("a", [(0.0, 0.0), (1.0, value)])], zero=True)
    assert text in [label for label, _ in labels(chart)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.834, "1.83"), (2e-5, "2e-5"), (1.5e-4, "1.5e-4"), (12_400, "12.4k"), (900, "900"), (3.2e6, "3.2M")],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_percent():
    assert [percent(x) for x in (0, 0.5, 0.123, 1)] == ["0\u00a0%", "50\u00a0%", "12.3\u00a0%", "100\u00a0%"]


@pytest.mark.parametrize("values", [(5.5221, 5.5443), (120_000.0, 120_004.0), (2.01e-5, 2.02e-5)])
def test_ticks_that_are_close_have_digits_that_differ(values):
    chart = line_chart("Loss", "", [Series("a", [(100_000, values[0]), (100_009, values[1])])])
    found = re.findall(r">([-−\d.ekM]+)</text>", chart.figure.svg())
    assert len(found) > 6
    assert len(set(found)) == len(found)
