"""layers.csv and matrices.json: what is written is read back, whatever a kill or a resume did in between."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json
from lightning_mm.core.layer_table import COLUMNS, LayerRow, append_layers, append_matrix, read_layers
from lightning_mm.core.run_directory import RunDirectory

numbers = st.none() | st.floats(-1e6, 1e6).map(lambda x: float(f"{x:.7g}"))
words = st.text(st.characters(exclude_categories=["C"]), max_size=20).map(lambda s: " ".join(s.split()))
rows = st.builds(
    LayerRow,
    step=st.integers(0, 10**9),
    analysis=st.sampled_from(["probing", "geometry", "drift"]),
    measure=st.sampled_from(["cka", "entailment/hard", "x,y", 'a"b']),
    site=st.sampled_from(["", "last", "image~text"]),
    layer=st.integers(-1, 60),
    value=st.floats(-1e6, 1e6).map(lambda x: float(f"{x:.7g}")),
    **dict.fromkeys(("low", "high", "null", "null_low", "null_high"), numbers),
    n=st.none() | st.integers(0, 10**6),
    k=st.none() | st.integers(1, 99),
    notes=st.lists(words.filter(lambda s: s and "; " not in s), max_size=3).map(tuple),
)


def of(step, layer=0, value=0.5, measure="cka", **rest):
    return LayerRow(step, "geometry", measure, "last", layer, value, **rest)


@given(st.lists(rows, max_size=12, unique_by=lambda r: (r.step, r.analysis, r.measure, r.site, r.layer)))
def test_rows_come_back_as_they_were(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("rows") / "layers.csv"
    append_layers(path, written)
    assert read_layers(path) == (written, 0)


def test_the_columns_are_the_contracts(tmp_path):
    path = tmp_path / "layers.csv"
    append_layers(path, [of(3, -1, None, undefined="constant", n=240, notes=("ties", "duplicates"))])
    header, line, end = path.read_text().split("\n")
    key, numbers = "step,analysis,measure,site,layer", "value,low,high,null,null_low,null_high,p_adjusted,n,k"
    assert header == f"{key},{numbers},undefined,notes"
    assert line == "3,geometry,cka,last,-1,,,,,,,,240,,constant,ties; duplicates"
    assert end == ""
    assert header == ",".join(COLUMNS)


def test_a_file_without_adjusted_p_values_is_read_and_continued(tmp_path):
    path = tmp_path / "layers.csv"
    path.write_text(
        "step,analysis,measure,site,layer,value,low,high,null,null_low,null_high,n,k,undefined,notes\n"
        "0,probing,objects,last,3,0.7,0.6,0.8,0.5,0.4,0.6,96,2,,\n"
    )
    (old,), bad = read_layers(path)
    assert (old.p_adjusted, old.n, bad) == (None, 96, 0)
    assert old.is_clear is False, "by interval and band"
    new = LayerRow(10, "probing", "objects", "last", 3, 0.7, null=0.5, p_adjusted=0.01, n=96)
    append_layers(path, [new])
    assert read_layers(path) == ([old, new], 0)
    assert new.is_clear


def test_a_step_that_is_looked_at_again_is_replaced_and_another_analysis_of_it_stays(tmp_path):
    path = tmp_path / "layers.csv"
    append_layers(path, [of(0), of(10)])
    append_layers(path, [of(10, measure="gap")])
    append_layers(path, [of(20)])
    append_layers(path, [of(10, value=0.7), of(20, value=0.8)])
    found, bad = read_layers(path)
    assert bad == 0
    assert sorted((row.step, row.measure, row.value) for row in found) == [
        (0, "cka", 0.5),
        (10, "cka", 0.7),
        (10, "gap", 0.5),
        (20, "cka", 0.8),
    ]


def test_a_step_whose_number_another_begins_with_is_another(tmp_path):
    path = tmp_path / "layers.csv"
    append_layers(path, [of(100)])
    append_layers(path, [of(10), of(1)])
    assert [row.step for row in read_layers(path)[0]] == [100, 10, 1]


def test_a_kill_at_any_byte_costs_what_was_not_written_and_a_resume_heals_it(tmp_path):
    path = tmp_path / "layers.csv"
    first, second = [of(0, i) for i in range(3)], [of(10, i, notes=('a "b", c',)) for i in range(3)]
    append_layers(path, first)
    kept = len(path.read_bytes())
    append_layers(path, second)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        found, bad = read_layers(path)
        assert found == [*first, *second][: len(found)]
        assert size < kept or len(found) >= 3
        assert bad <= 1
        append_layers(path, [*(first if size < kept else []), *second])
        assert read_layers(path) == ([*first, *second], 0)
    assert [p.name for p in tmp_path.iterdir()] == ["layers.csv"]


def test_a_line_that_holds_no_measurement_is_counted_and_the_others_are_read(tmp_path):
    path = tmp_path / "layers.csv"
    append_layers(path, [of(0, i) for i in range(4)])
    good = path.read_text().split("\n")
    bad = [
        "x" * 200_000 + '"',
        "1,geometry,cka,last,5000,1,,,,,,,,,",
        "-1,geometry,cka,last,0,1,,,,,,,,,",
        "\x00",
        "a,b",
    ]
    bad += ["1,geometry,cka,last,zero,1,,,,,,,,,", "1,geometry,,last,0,1,,,,,,,,,", '1,geometry,"cka,last,0,1,,,,,,,,,']
    path.write_text("\n".join([*good[:3], *bad, *good[3:]]))
    found, lost = read_layers(path)
    assert [row.layer for row in found] == [0, 1, 2, 3]
    assert lost == len(bad)


def test_what_is_not_finite_is_undefined_and_never_a_number(tmp_path):
    path = tmp_path / "layers.csv"
    append_layers(path, [of(0, 0, math.nan), of(0, 1, 1.0, low=-math.inf, high=math.nan)])
    path.write_text(path.read_text() + "0,geometry,cka,last,2,inf,,,,,,,,,,\n")
    found, _ = read_layers(path)
    assert [(row.value, row.low, row.high, row.undefined) for row in found] == [
        (None, None, None, "no value"),
        (1.0, None, None, ""),
        (None, None, None, "no value"),
    ]


def test_one_row_is_one_line_whatever_a_note_holds(tmp_path):
    path = tmp_path / "layers.csv"
    append_layers(path, [of(0, notes=("a\nb\r\n10,c",)), of(0, 1)])
    assert [row.notes for row in read_layers(path)[0]] == [("a b 10,c",), ()]


def test_no_file_is_said(tmp_path):
    with pytest.raises(UserError, match=r"layers\.csv is missing"):
        read_layers(tmp_path / "layers.csv")


def test_matrices_are_kept_by_step_measure_and_site(tmp_path):
    run = RunDirectory.create(tmp_path, "a")
    for step, site, value in [(0, "last", 0.1), (0, "image", 0.2), (5, "last", 0.3), (0, "last", math.nan)]:
        append_matrix(run, step, "cka", site, [-1, 0], [[1.0, value], [value, 1.0]])
    found = read_json(run.matrices)
    assert [(m["step"], m["site"], m["values"][0][1]) for m in found] == [
        (0, "image", 0.2),
        (5, "last", 0.3),
        (0, "last", None),
    ]
    assert found[0] == {"step": 0, "measure": "cka", "site": "image", "layers": [-1, 0], "values": [[1, 0.2], [0.2, 1]]}


@pytest.mark.parametrize("text", ["", "{", "null", "[1]"])
def test_matrices_that_were_broken_are_begun_anew(tmp_path, text):
    run = RunDirectory.create(tmp_path, "a")
    run.matrices.write_text(text)
    append_matrix(run, 0, "cka", "last", [0], [[1.0]])
    assert [m["step"] for m in read_json(run.matrices)] == [0]


def test_an_append_does_not_rewrite_what_is_there(tmp_path):
    path = tmp_path / "layers.csv"
    append_layers(path, [of(0)])
    before = path.stat().st_ino
    append_layers(path, [of(1)])
    assert path.stat().st_ino == before
    append_layers(path, [replace(of(1), value=0.1)])
    assert path.stat().st_ino != before  # replaced whole, by a rename
