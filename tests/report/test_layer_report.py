"""The report of a run that was looked into, and of a folder that only an inspection made: complete, safe, unmoved."""

import json
import re
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mm.core.io import write_json
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report.html import write_report
from tests.helpers.page import Page

SOME = [("probing", "entailment/hard", "last"), ("geometry", "overlap", "last"), ("drift", "drift_overlap", "image")]
FILES = ["layers.csv", "matrices.json", "probes.json", "inspections.json", "selection.json", "inspection.json"]
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&\u202e"


@pytest.fixture
def inspected(tmp_path, choose, look_into):
    """A folder as ``lightning-mm inspect`` leaves it, of two models compared."""
    made = choose(look_into(RunDirectory.create(tmp_path, "inspect-a-b"), (0, 1), SOME))
    labels = {"0": "runs/a", "1": "runs/b"}
    write_json(made.inspection, {"title": "a against b", "model": "Idefics3", "labels": labels})
    write_json(made.census, {"layers": {"expression": "", "trained": [7, 8, 9], "total": 30}})
    return made


def page_of(run):
    return Page(write_report(run.path).read_text(encoding="utf-8"))


def sections(page):
    return re.findall(r'<section id="([\w-]+)"', page.raw)


def test_a_run_that_was_not_looked_into_has_no_empty_sections(tmp_path, write_census):
    page = page_of(write_census(RunDirectory.create(tmp_path, "plain")))
    assert "inside" not in sections(page)
    assert "chosen" not in sections(page)
    assert "lightning_mm run report" in page.text


def test_a_run_that_was_looked_into_says_where_the_trained_layers_are_and_what_moved(looked, choose):
    page = page_of(choose(looked))
    assert sections(page) == [
        "accuracy",
        "curves",
        "trains",
        "chosen",
        "inside",
        "samples",
        "decisions",
        "left-out",
        "config",
    ]
    assert re.findall(r'href="#([\w-]+)"', page.raw) == sections(page)
    for words in [
        "Layers 7–14 of 30 train.",
        "Most moved: layer 14, which trains",
        "Do picture and text agree?",
        "Where do picture and caption meet?",
        "6 looks took 43.8 s",
        "constant: all 240 samples coincide",
        "Layers 7-14 were chosen by what the untrained model shows.",
        "EarlyLayers",
    ]:
        assert words in page.text, words
    assert page.text.count("constant: all 240 samples coincide") == 1
    figures = page.raw.split('<section id="inside">')[1].split("</section>")[0].split("<figure")[1:]
    assert len(figures) > 25
    shown = page.raw.split('<section id="inside">')[1].split("</section>")[0]
    shown = re.sub(r"<details.*?</details>", "", re.sub(r"<noscript>.*?</noscript>", "", shown)).split("<figure")[1:]
    assert len(shown) > 8
    assert all("trained_bar_marks" in figure for figure in shown)
    assert all("<noscript>" in figure for figure in figures)  # those on demand are drawn in a browser, or a table
    assert len(page.whole) < 3_000_000


def test_an_inspection_is_titled_as_one_and_shows_only_what_there_is(inspected):
    page = page_of(inspected)
    assert sections(page) == ["chosen", "inside"]
    assert "lightning_mm inspection report" in page.text
    assert "a against b" in page.text
    assert "Compared: runs/a and runs/b." in page.text
    assert "Idefics3" in page.text
    assert "The run has no" not in page.text
    assert "No result yet" not in page.text
    assert "step 0" not in page.text.replace("first step", "")  # the labels stand in place of steps


@pytest.mark.parametrize(
    "gone", [["inspection.json"], ["inspection.json", "census.json"], ["layers.csv"], ["selection.json"]]
)
def test_an_inspection_with_less_shows_less(inspected, gone):
    for name in gone:
        (inspected.path / name).unlink()
    page = page_of(inspected)
    assert ("chosen" in sections(page)) == ("selection.json" not in gone)
    assert "inside" in sections(page)
    assert "inspection report" in page.text
    if "census.json" in gone:
        assert "From what" not in page.text
        assert "Layers 7–14 of 30 were chosen to train." in page.text


def test_no_evidence_is_said(tmp_path, choose):
    page = page_of(choose(RunDirectory.create(tmp_path, "a"), evidence=False))
    assert "The model shows no evidence for any layers: 7-14 is a fall-back." in page.text


def test_nothing_outside_the_file_is_asked_for_and_nothing_runs(inspected):
    page = page_of(inspected)
    assert not {"script", "link", "iframe", "object", "base", "form", "use", "image", "foreignobject"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith(("data:", "#")) for name, value in page.attributes if name in ("src", "href"))
    assert "url(" not in page.raw


@pytest.mark.parametrize("name", FILES)
def test_hostile_text_is_text_wherever_it_stands(inspected, name):
    path = inspected.path / name
    if name.endswith(".json"):
        write_json(path, hostile(json.loads(path.read_text())))
    else:
        quoted = '"' + HOSTILE.replace('"', '""') + '"'
        lines = path.read_text().replace("geometry,overlap,last", f"geometry,{quoted},{quoted}")
        path.write_text(re.sub(r"constant: [^,\n]*,\n", f"{quoted},{quoted}\n", lines))
    page = page_of(inspected)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert('x')</script>" in page.text


def hostile(value):
    if isinstance(value, dict):
        return {
            (key + HOSTILE if key in ("overlap", "forward", "objects") else key): hostile(v) for key, v in value.items()
        }
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE + value if isinstance(value, str) else value


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "directory", "list", "null", "binary", "deep"])
def test_a_damaged_file_costs_its_own_part_only(inspected, name, damage):
    path = inspected.path / name
    whole = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage != "missing":
        told = {
            "empty": b"",
            "cut": whole[: len(whole) * 2 // 3],
            "list": b"[[1]]",
            "null": b"null",
            "deep": b"[" * 100_000,
        }
        path.write_bytes(told.get(damage, bytes(range(256)) * 4))
    text = page_of(inspected).text
    others = {"layers.csv": "Entailment, hard", "matrices.json": "Layer by layer", "probes.json": "The probe set"}
    others |= {"inspections.json": "2 looks took", "selection.json": "EarlyLayers", "inspection.json": "a against b"}
    for other, words in others.items():
        assert other == name or words in text
    if damage in ("cut", "list", "binary", "deep") and name not in ("layers.csv", "inspection.json"):
        assert re.search(rf"{name} (is not as it should be|cannot be read)", text)
    if damage == "cut" and name == "layers.csv":
        assert "1 lines of layers.csv cannot be read" in text


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)  # one example writes a whole report: some 10 ms, more on a busy machine
@given(st.data())
def test_no_content_crashes_the_report(tmp_path_factory, data):
    """Real shapes with one part replaced by anything at all."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    matrix = {"step": 0, "measure": "cka", "site": "last", "layers": [-1, 0], "values": [[None, 0.5], [0.5, 1.0]]}
    files = {
        run.matrices: [matrix],
        run.probes: {
            "hash": "h",
            "seed": 0,
            "source": "s",
            "rows": 3,
            "images": 1,
            "tasks": {"objects": {"rows": 1, "images": 1}},
        },
        run.inspections: [{"step": 0, "seconds": {"forward": 1.0}, "share": 0.1, "problems": ["p"]}],
        run.inspection: {"title": "t", "model": "m", "labels": {"0": "a"}},
        run.census: {"layers": {"trained": [0], "total": 2}},
        run.selection: {
            "layers": [0],
            "first_range": [0, 1],
            "last_range": [0, 1],
            "score": [0.5, 0.1],
            "score_low": [0.4, 0.0],
            "score_high": [0.6, 0.2],
            "criteria": {"overlap": [0.1, None]},
            "controls": {"Late": "1"},
            "evidence": True,
            "why": ["w"],
        },
    }
    for path, content in files.items():
        holder = data.draw(st.sampled_from([content, *_containers(content)]))
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if keys:
            holder[data.draw(st.sampled_from(keys))] = data.draw(anything)
        path.write_text(json.dumps(content))
    cell = st.sampled_from(["", "0", "1", "-1", "7", "1e308", "-1e99", "nan", "x", "cka", "drift_overlap", '"', "last"])
    lines = data.draw(st.lists(st.lists(cell, min_size=15, max_size=15).map(",".join), max_size=8))
    good = ["0,geometry,cka,last,0,0.5,,,,,,3,,,", "0,geometry,cka,last,1,0.7,0.6,0.8,0,-0.1,0.1,3,2,,note"]
    head = "step,analysis,measure,site,layer,value,low,high,null,null_low,null_high,n,k,undefined,notes"
    run.layers.write_text("\n".join([head, *good, *lines, ""]))
    assert "CKA" in write_report(run.path).read_text()
    shutil.rmtree(run.path)


def _containers(content):
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [found for item in inner if isinstance(item, dict | list) for found in [item, *_containers(item)]]
