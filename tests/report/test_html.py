"""The report: complete without any service, safe against what a model says, and unmoved by missing or broken files."""

import base64
import csv
import io
import json
import math
import re
import struct
import zlib

import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import append_jsonl, write_json
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report.html import write_report
from lightning_mm.report.sections.samples import thumbnail
from lightning_mm.report.tables.curves import read_curves
from tests.helpers.page import Page

CHECKED = ["census.json", "samples.json", "evaluation.json", "decisions.json"]
FILES = [*CHECKED, "metrics.csv", "ledger.jsonl", "config.yaml", "run.json"]
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&\u202e"


@pytest.fixture
def run(tmp_path):
    made = RunDirectory.create(tmp_path, "middle")
    made.config.write_text("model:\n  backbone:\n    class_path: P\n    init_args: {path: nano/smolvlm}\n")
    row = {"mode": "frozen", "parameters": 100, "trainable": 0, "dtype": "float32", "training": False}
    moving = row | {"mode": "full", "trainable": 100, "training": True, "lr": 2e-4, "weight_decay": 0.01}
    regions = [("vision", row), ("layers 0-1", row), ("layers 2-3", moving), ("layers 4-5", row), ("head", row)]
    census = {"digest": "d1", "policy": "IntermediateOnly(layers='25%-50%')", "total_parameters": 500}
    census |= {"layers": {"expression": "2-3", "trained": [2, 3], "total": 6}, "trainable_parameters": 100}
    write_json(made.census, census | {"rows": [r | {"region": name} for name, r in regions]})
    write_json(made.decisions, [{"name": "tuning.layers", "value": "2-3", "reason": "25%-50% of 6"}])
    scores = [("colour", 60, 0.1, 0.9, 0.3, 0.35), ("count", 60, 0.2, 0.35, 0.3, None)]
    keys = ("type", "n", "before", "after", "majority", "no_image")
    rows = [dict(zip(keys, s, strict=True)) for s in [*scores, ("all", 120, 0.15, 0.625, 0.3, 0.35)]]
    write_json(made.evaluation, {"split": "test", "rows": rows})
    made.pictures.mkdir()
    Image.new("RGB", (640, 320), "red").save(made.pictures / "1.png")
    sample = {"id": "1", "images": ["samples/1.png"], "question": "Color?", "truth": "red", "type": "color"}
    sample |= {"before": "blue", "after": "red", "correct_before": False, "correct_after": True}
    write_json(made.samples, [sample])
    append_jsonl(made.ledger, [{"origin": f"a:{i}", "reason": "too long", "kind": "cut"} for i in range(3)])
    with made.metrics.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "train/loss", "train/lr/layers", "val/loss", "val/exact_match"])
        writer.writerows([[0, i, 3 / (i + 1), 1e-4, "", ""] for i in range(50)] + [[0, 49, "", "", 0.5, 0.6]])
    return made


def page_of(run):
    return Page(write_report(run.path).read_text(encoding="utf-8"))


def test_everything_of_the_run_is_said(run):
    text = page_of(run).text
    for words in [
        "Exact match 15 % → 62.5 % on 120 test questions (majority 30 %; without the picture 35 %).",
        "IntermediateOnly(layers='25%-50%')",
        "nano/smolvlm",
        "2–3 of 6",
        "100 of 500 (20 %)",
        "tuning.layers",
        "25%-50% of 6",
        "too long",
        "3 rows were dropped or cut",
        "1 became right",
        "train, mean",
        "class_path: P",
        "above both",
        "not above majority",
    ]:
        assert words in text, words


def test_the_strip_shows_each_layer_once_and_which_train(run):
    page = write_report(run.path).read_text()
    assert re.findall(r'class="layer (\w+)"', page) == ["frozen", "frozen", "full", "full", "frozen", "frozen"]
    lora = json.loads(run.census.read_text())
    lora["rows"][2]["mode"] = "lora"
    write_json(run.census, lora)
    assert 'class="layer lora" title="layer 2: lora"' in write_report(run.path).read_text()


def test_nothing_outside_the_file_is_asked_for_and_nothing_runs(run):
    page = page_of(run)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith(("data:", "#")) for name, value in page.attributes if name in ("src", "href"))
    style = write_report(run.path).read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert any("default-src 'none'" in value for name, value in page.attributes if name == "content")


@pytest.mark.parametrize("name", FILES)
def test_hostile_text_is_text_wherever_it_stands(run, name):
    path = run.path / name
    if name.endswith(".json"):
        write_json(path, _hostile(json.loads(path.read_text())))
    elif name.endswith(".jsonl"):
        path.write_text(json.dumps(_hostile(json.loads(path.read_text().split("\n")[0]))) + "\n")
    elif name.endswith(".yaml"):
        path.write_text(f"model: {{backbone: {json.dumps(HOSTILE)}}}\n")
    else:
        path.write_text(path.read_text().replace("train/lr/layers", '"train/lr/' + HOSTILE.replace('"', '""') + '"'))
    page = page_of(run)
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("data:") for name, value in page.attributes if name == "src")
    assert ("<script>alert('x')</script>" in page.text) == (name != "run.json")


def _hostile(value):
    if isinstance(value, dict):
        return {key: _hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hostile(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_right_and_wrong_are_words_not_colors(run):
    words = page_of(run).text
    assert re.search(r"Before ?wrong.*After ?right ?red", words)


def test_the_picture_is_inside_and_small(run):
    page = page_of(run)
    (source,) = [value for name, value in page.attributes if name == "src"]
    with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as picture:
        assert picture.size == (160, 80)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "samples/none.png", "samples", "samples/text.png"])
def test_a_picture_that_is_elsewhere_or_none_is_not_shown(run, name):
    Image.new("RGB", (4, 4)).save(run.path.parent / "secret.png")
    (run.pictures / "text.png").write_text("no picture")
    assert thumbnail(run.path, name) == ""
    row = {"images": [name], "question": "q", "truth": "t"}
    write_json(run.samples, [row])
    assert "1 picture cannot be shown" in page_of(run).text


def test_a_picture_of_too_many_pixels_is_not_decoded(run):
    Image.new("1", (9000, 9000)).save(run.pictures / "bomb.png")
    assert thumbnail(run.path, "samples/bomb.png") == ""


def test_no_picture_starts_another_program(run, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: started.append(args) or Image.new("RGB", (30, 50)))
    Image.new("RGB", (30, 50)).save(run.pictures / "x.png", "EPS")
    assert thumbnail(run.path, "samples/x.png") == ""
    assert not started


@pytest.mark.parametrize("fault", [struct.error("short"), zlib.error("bad"), EOFError(), IndexError(), OverflowError()])
def test_whatever_a_decoder_raises_costs_the_picture_only(run, monkeypatch, fault):
    def broken(picture):
        raise fault

    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    Image.new("RGB", (30, 50)).save(run.pictures / "x.png")
    assert thumbnail(run.path, "samples/x.png") == ""


def test_odd_pictures_are_shown(run):
    for mode in ("L", "P", "RGBA", "CMYK", "I;16", "LA"):
        name = f"samples/{mode[0]}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (30, 50)).save(run.path / name)
        assert thumbnail(run.path, name).startswith("data:image/jpeg;base64,"), mode


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "directory", "list", "null", "binary"])
def test_a_damaged_file_costs_its_own_section_only(run, name, damage):
    path = run.path / name
    whole = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage != "missing":
        told = {"empty": b"", "cut": whole[: len(whole) * 2 // 3], "list": b"[[1]]", "null": b"null"}
        path.write_bytes(told.get(damage, bytes(range(256)) * 4))
    text = page_of(run).text
    if name in CHECKED and damage != "null":
        assert re.search(rf"The run has no {name}|{name} (is not as it should be|cannot be read)", text)
    others = {"census.json": "2–3 of 6", "decisions.json": "25%-50% of 6", "samples.json": "1 became right"}
    others |= {"evaluation.json": "above both", "ledger.jsonl": "too long"}
    for other, words in others.items():
        assert other == name or words in text


def test_an_empty_folder_gets_a_report_that_says_so(tmp_path):
    text = Page(write_report(tmp_path).read_text()).text
    assert "No result yet." in text
    assert text.count("The run has no") == 7


def test_no_folder_is_the_users_fault(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        write_report(tmp_path / "none")


def test_curves_are_read_as_the_logger_wrote_them(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,a,b\n0,1,2.5,\n0,2,,7\n0,2,3.5,\n0,1,9,\n,,4,4\n0,3,x,nan\n0,4,1.2")
    curves = read_curves(path)
    assert curves["a"] == [(1.0, 9.0), (2.0, 3.5)]  # step 1 was run again: its last value counts; step 4 is half a line
    assert curves["b"][0] == (2.0, 7.0)
    assert math.isnan(curves["b"][1][1])
