"""Traces: each cell where its layer and token are, coloured by its sign; what is no trace is told, no other lost."""

import json
import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_mm.core.errors import UserError
from lightning_mm.report.figures import theme
from lightning_mm.report.figures.trace_maps import WIDTH, columns, save_trace, trace_map
from lightning_mm.report.tables.panels import TrainedLayers
from lightning_mm.report.tables.traces import Trace, read_traces, window_words
from tests.helpers import page
from tests.helpers.causal_files import LAYERS, TEXT, trace_of
from tests.helpers.page import marks, texts

TRAINED = TrainedLayers((2, 3), LAYERS)
HOSTILE = "<script>alert('x')</script>\"'&]]>\u202e\x00\x1b\ud800\ufffe👩‍🚀עברית"


def drawn(trace, **options):
    return trace_map(Trace.of(trace), TRAINED, **options).svg()


def cells(svg):
    """(left, top, signed level, words) of each cell that says its value."""
    found = page.cells(svg, theme.SIGNED).items()
    return [(left, top, level - theme.ARM, words) for words, (left, top, level) in found]


def place(element):
    """Where a mark stands."""
    return tuple(map(float, re.match(r"translate\(([-\d.]+),([-\d.]+)\)", element.get("transform")).groups()))


def test_each_cell_stands_at_its_layer_and_token_and_says_its_value():
    found = cells(drawn(trace_of(images=0)))
    assert len(found) == LAYERS * len(TEXT)
    best = next(cell for cell in found if cell[3] == "layer 3, token 5 “ Tower” (constraint): 60\u00a0%")
    worst = next(cell for cell in found if cell[3] == "layer 1, token 0 “ In” (rest of question): -30\u00a0%")
    assert (best[2], worst[2]) == (theme.ARM, -round(theme.ARM / 2))
    assert {level for *_, level, words in found if words.endswith(": 0\u00a0%")} == {0}
    lefts, tops = sorted({cell[0] for cell in found}), sorted({cell[1] for cell in found}, reverse=True)
    assert lefts.index(best[0]) == 5
    assert tops.index(best[1]) == 3  # layer 0 is at the bottom


def test_the_ring_stands_at_the_strongest_and_lines_enclose_the_constraint():
    svg = drawn(trace_of(images=0))
    (ring,) = marks(svg, "peak")
    best = next(cell for cell in cells(svg) if cell[2] == theme.ARM)
    width = sorted({cell[0] for cell in cells(svg)})[1]
    assert place(ring)[0] == pytest.approx(best[0] + width / 2, abs=0.1)
    sides = [place(side)[0] for side in marks(svg, "constraint")]
    assert sides == pytest.approx([4 * width, 6 * width], abs=0.1)
    bold = [
        t.text for t in ET.fromstring(svg).iter("text") if (t.get("font-weight"), t.get("fill")) == ("bold", theme.INK)
    ]
    assert sorted(bold) == ["?", "Tower", "constraint", "the"]
    assert len(marks(svg, "trained_bar")) == 1


def test_a_long_run_of_picture_tokens_is_one_narrow_group_with_its_own_label():
    trace = trace_of(images=64)
    trace["values"][2][42] = -0.5
    svg = drawn(trace)
    assert "64 picture tokens" in texts(svg, "kinds")
    assert len(cells(svg)) == LAYERS * (16 + len(TEXT))
    strongest = [level for *_, level, words in cells(svg) if words.startswith("layer 2, 4 tokens from 40")]
    assert strongest == [-round(theme.ARM * 0.5 / 0.6)]  # the extreme of its part, with its sign


def test_parts_that_stand_for_several_tokens_count_all_of_them():
    trace = trace_of(images=8, sizes=[8] * 8 + [1] * len(TEXT))
    assert "64 picture tokens" in texts(drawn(trace), "kinds")


@pytest.mark.parametrize(
    ("images", "tokens", "layers"), [(0, 1, 1), (1, 1, 30), (2000, 40, 30), (0, 600, 80), (0, 5, 999), (5, 300, 2)]
)
def test_drawings_keep_their_size_whatever_the_prompt(images, tokens, layers):
    texts = [f" w{i}" for i in range(tokens)]
    kinds = [*["question"] * (tokens - 1), "last"]
    trace = Trace.of(trace_of(images, layers, texts, kinds))
    found, left_out = columns(trace)
    assert found[0].x == 0
    assert found[-1].right <= WIDTH + 1e-6
    assert all(a.x + a.width <= b.x + 0.01 for a, b in pairwise(found))
    assert [i for c in found for i in range(c.first, c.end)] == list(range(images + tokens - left_out))
    assert left_out == 0 or layers == 999
    assert len(trace_map(trace, TRAINED, tips=False).svg()) < 450_000


@given(st.lists(st.sampled_from(["image_early", "constraint", "question", "template", "last", "x"]), min_size=1))
@settings(deadline=None)
def test_every_token_has_its_place(kinds):
    kinds = kinds * 12
    raw = trace_of(0, 2, [f"t{i}" for i in range(len(kinds))], kinds)
    found, left_out = columns(Trace.of(raw))
    assert [i for c in found for i in range(c.first, c.end)] == list(range(len(kinds) - left_out))
    assert found[-1].right <= WIDTH + 1e-6


def test_undefined_cells_are_hatched_and_all_undefined_is_said():
    trace = trace_of(images=0)
    trace["values"][0][0], trace["values"][2][1] = None, math.nan
    svg = drawn(trace)
    assert len(cells(svg)) == LAYERS * len(TEXT) - 2
    assert len(marks(svg, "hatch")) == len(marks(svg, "undefined")) == 2
    empty = trace_of(images=0, values=[[None] * len(TEXT)] * LAYERS)
    assert "undefined everywhere" in ET.fromstring(drawn(empty)).get("aria-label")
    harmful = trace_of(images=0, values=[[-0.1] * len(TEXT)] * LAYERS)
    assert "nothing comes back anywhere" in ET.fromstring(drawn(harmful)).get("aria-label")


def test_hostile_tokens_are_text_even_in_a_file_of_its_own(tmp_path):
    tokens = [HOSTILE, "x" * 300, "", " ", "\n\t", "�", "字" * 40]
    trace = trace_of(images=0, tokens=tokens, text=HOSTILE, target=HOSTILE, window=HOSTILE, site=HOSTILE)
    svg = drawn(trace)
    known = {"svg", "title", "path", "text", "g", "line"}
    assert {element.tag for element in ET.fromstring(svg).iter()} <= known
    labels = [label.text for label in marks(svg, "tokens")]
    assert all(len(label) <= 16 for label in labels)
    assert "↵⇥" in labels
    for name in ("t.svg", "t.png"):
        save_trace(trace, tmp_path / name, (2, 3))
    file = ET.parse(tmp_path / "t.svg").getroot()
    assert not [e for e in file.iter() if e.tag.endswith("script")]
    assert "<script>alert('x')</script>" in "".join(file.itertext())
    assert "\u202e" not in "".join(file.itertext())


def test_a_picture_file_shows_the_effect_where_it_is(tmp_path):
    trace = trace_of(images=0)
    figure = trace_map(Trace.of(trace), TRAINED, headed=True)
    path = save_trace(trace, tmp_path / "trace.png", TRAINED.layers)
    x, y = place(marks(figure.svg(), "peak")[0])
    with Image.open(path) as picture:
        assert picture.size == tuple(round(2 * side) for side in map(round, figure.size))
        at = (round(2 * (figure.origin[0] + x)), round(2 * (figure.origin[1] + y)))
        assert picture.convert("RGB").getpixel(at) == theme.SIGNED_LIGHT[-1]
    text = (save_trace(Trace.of(trace), tmp_path / "trace.svg")).read_text()
    assert "In which city is the Tower?" in text
    assert "“Paris”: 90\u00a0% clean, 10\u00a0% corrupt" in text
    assert "one layer at a time (P2)" in text


@pytest.mark.parametrize("name", ["trace.gif", "trace", "no/such/folder/t.svg"])
def test_a_file_that_cannot_be_is_the_users_fault(tmp_path, name):
    with pytest.raises(UserError):
        save_trace(trace_of(), tmp_path / name)
    with pytest.raises(UserError, match="no trace"):
        save_trace({"layers": [0]}, tmp_path / "t.svg")


@pytest.mark.parametrize(
    "changed",
    [
        {"layers": []},
        {"layers": [0, 0, 1, 2, 3, 4]},
        {"layers": [5000 + i for i in range(LAYERS)]},
        {"tokens": []},
        {"values": [[0.0]]},
        {"values": None},
        {"classes": ["last"]},
        {"positions": [1]},
        {"sizes": [1]},
        {"layers": ["a"] * LAYERS},
        {"tokens": ["x"] * 30_000},
    ],
)
def test_what_is_no_trace_is_counted_and_the_others_are_read(changed):
    found, left, problems = read_traces([trace_of(), trace_of() | changed, 7], 12)
    assert (len(found), left) == (1, 0)
    assert all(problem.startswith("1 of 3 traces cannot be read") for problem in problems)
    assert len(problems) == 2


def test_all_that_json_can_hold_is_read_back():
    again = json.loads(json.dumps(trace_of()))
    assert Trace.of(again) == Trace.of(trace_of())


@pytest.mark.parametrize(
    ("window", "words"),
    [
        ("p2:5", "11 layers at a time (P2, w = 5)"),
        ("rome:1", "one layer at a time (ROME)"),
        ("", ""),
        ("p2:x", "window p2:x"),
    ],
)
def test_windows_are_named_by_their_convention(window, words):
    assert window_words(window) == words
