"""The section "What causes the answer": there where causes were looked for, complete, safe, and small."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_mm.core.io import write_json
from lightning_mm.core.layer_table import append_layers
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report.html import write_report
from tests.helpers.causal_files import effects, overlay_of, trace_of, traced_rows
from tests.helpers.page import Page

FILES = ["traces.json", "pictures.json", "causal.json", "layers.csv"]
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&\u202e👩‍🚀"
TABLE = {"title": "Does it know?", "columns": ["Predictor", "AUROC"], "rows": [["confidence", [0.83, 0.76, 0.9]]]}


@pytest.fixture
def traced(tmp_path):
    """A folder as ``lightning-mm trace`` leaves it."""
    run = RunDirectory(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (60, 40), "white").save(tmp_path / "pictures" / "a.png")
    append_layers(run.layers, [*traced_rows(), *effects()])
    write_json(
        tmp_path / "traces.json",
        [trace_of(id=f"q{i}", site=s, image="a.png") for i in range(2) for s in ("mlp", "attention")],
    )
    write_json(tmp_path / "pictures.json", [overlay_of(), overlay_of(words=[["cat"] * 6] * 4)])
    told = {"title": "Traces of nano", "model": "Idefics3", "n_questions": 40, "n_right": 31}
    write_json(tmp_path / "causal.json", told | {"tables": [TABLE | {"note": "by picture"}]})
    write_json(run.census, {"layers": {"expression": "", "trained": [2, 3], "total": 6}})
    return run


def page_of(run):
    return Page(write_report(run.path).read_text(encoding="utf-8"))


def sections(page):
    return re.findall(r'<section id="([\w-]+)"', page.raw)


def test_a_trace_says_where_the_effect_is_and_shows_it(traced):
    page = page_of(traced)
    assert sections(page) == ["causes"]
    for words in [
        "Traces of nano",
        "Idefics3",
        "40 questions asked, 31 answered right.",
        "MLP put back at layer 3 (constraint) brings back most: 50 % of the lost probability (40 % to 60 %).",
        "Cutting attention from question to last token about layer 4 costs most",
        "most: 60 % at layer 3, “Tower”",
        "“Paris”: 90 % clean, 10 % corrupt.",
        "one layer at a time (P2)",
        "Question to last token, rest renormalised (pre)",
        "Picture to constraint",
        "Output set to zero, attention",
        "0.83 (0.76 to 0.9)",
        "by picture",
        "no such token <b>",
    ]:
        assert words in page.text, words
    assert "chance" not in Page(page.raw.split("</style>")[1]).text.lower()
    assert "The run has no" not in page.text
    figures = page.raw.split('<section id="causes">')[1].count("<figure")
    assert figures > 20
    assert page.raw.index("rest renormalised (pre)") < page.raw.index("rest unchanged (post)")


def test_nothing_outside_the_file_is_asked_for_and_nothing_runs(traced):
    page = page_of(traced)
    assert {"script", "link", "iframe", "object"} & set(page.tags) == set()
    assert all(value.startswith(("data:", "#")) for name, value in page.attributes if name in ("src", "href"))
    assert "url(" not in page.raw
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_run_that_looked_into_causes_too_has_both_sections(looked):
    before = page_of(looked)
    for step in (0, 20):
        append_layers(looked.layers, [*traced_rows(step, layers=30), *effects(step, layers=30)])
    page = page_of(looked)
    assert sections(page) == [*(s := sections(before))[: s.index("samples")], "causes", *s[s.index("samples") :]]
    assert "step 20" in page.text.split("What causes the answer")[2]
    inside = page.raw.split('<section id="inside">')[1].split("</section>")[0]
    assert inside == before.raw.split('<section id="inside">')[1].split("</section>")[0]


def test_a_run_without_causes_has_no_such_section(looked):
    assert "causes" not in sections(page_of(looked))


@pytest.mark.parametrize("name", FILES)
def test_hostile_text_is_text_wherever_it_stands(traced, name):
    path = traced.path / name
    if name.endswith(".json"):
        write_json(path, hostile(json.loads(path.read_text())))
    else:
        quoted = '"' + HOSTILE.replace('"', '""') + '"'
        path.write_text(path.read_text().replace("no such token <b>", quoted).replace("mlp/last", quoted))
    page = page_of(traced)
    assert not {"script", "b-x"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith(("data:", "#")) for name, value in page.attributes if name in ("src", "href"))
    assert "<script>alert('x')</script>" in page.text


def hostile(value):
    if isinstance(value, dict):
        return {key: item if key == "image" else hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE + value if isinstance(value, str) else value


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "directory", "list", "null", "binary", "deep"])
def test_a_damaged_file_costs_its_own_part_only(traced, name, damage):
    path = traced.path / name
    whole = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage != "missing":
        told = {"empty": b"", "cut": whole[: len(whole) * 2 // 3], "list": b"[[1]]", "null": b"null"}
        path.write_bytes((told | {"deep": b"[" * 100_000}).get(damage, bytes(range(256)) * 4))
    text = page_of(traced).text
    others = {"traces.json": "most: 60 % at layer 3", "pictures.json": "On the picture", "causal.json": "Does it know?"}
    others |= {"layers.csv": "Picture to constraint"}
    for other, words in others.items():
        assert other == name or words in text
    if damage in ("cut", "binary", "deep") and name.endswith(".json"):
        assert f"{name} cannot be read" in text
    if damage == "list" and name.endswith(".json"):
        assert "cannot be read" in text or "is not as it should be" in text


def test_many_traces_are_counted_and_the_page_stays_small(traced):
    big = [trace_of(images=2000, layers=40, tokens=[f" w{i}" for i in range(60)], kinds=["constraint"] * 60)] * 14
    write_json(traced.path / "traces.json", big)
    page = page_of(traced)
    assert "2 further traces stand in traces.json." in page.text
    assert len(page.whole) < 4_000_000
    assert page.text.count("2,000 picture tokens") == 12


@pytest.mark.parametrize("content", [[], [{}], {"tables": []}, {"tables": [{"title": "t", "columns": [], "rows": []}]}])
def test_empty_files_are_no_fault(traced, content):
    for name in FILES[:3]:
        write_json(traced.path / name, content)
    assert "Picture to constraint" in page_of(traced).text


def test_long_and_odd_tables_are_cut_and_said(traced):
    rows = [[i, None, float("nan"), True, "x" * 5000, [0.5, None, None]] for i in range(500)]
    table = {"title": "Long", "columns": list("abcdef"), "rows": rows, "note": None}
    (traced.path / "causal.json").write_text(json.dumps({"tables": [table]}))
    page = page_of(traced)
    assert "500 rows and 6 columns stand in causal.json." in page.text
    assert page.raw.count("x" * 300) == 60
    assert "nan" not in page.text.lower().split("long")[-1]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None)  # one example writes a whole report
@given(st.data())
def test_no_content_crashes_the_report(tmp_path_factory, data):
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    content = {
        "traces.json": [trace_of(images=2, layers=2)],
        "pictures.json": [overlay_of(grid=(2, 2), words=[["a", "b"]] * 2)],
        "causal.json": {"title": "t", "model": "m", "n_questions": 3, "n_right": 1, "tables": [TABLE]},
    }
    append_layers(run.layers, effects(layers=2))
    for name, told in content.items():
        told = json.loads(json.dumps(told))
        holder = data.draw(st.sampled_from([told, *_containers(told)]))
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if keys:
            holder[data.draw(st.sampled_from(keys))] = data.draw(anything)
        (run.path / name).write_text(json.dumps(told))
    assert "Picture to constraint" in write_report(run.path).read_text()


def _containers(content):
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [found for item in inner if isinstance(item, dict | list) for found in [item, *_containers(item)]]
