"""The report in a browser: it works, asks for nothing, breaks no rule of accessibility, and is quick and small.

Needs Chromium, which ``scripts/browser.sh`` installs; skipped without it, but not in CI, where it must be.
"""

import base64
import csv
import os
import shutil
import xml.etree.ElementTree as ET
from importlib.resources import files

import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from lightning_mm.__main__ import main
from lightning_mm.core.io import write_json
from lightning_mm.core.layer_table import append_layers
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report.check_page import write_check_page
from lightning_mm.report.html import write_report
from tests.helpers.causal_files import effects, trace_of, traced_rows
from tests.helpers.cli import QUICK
from tests.helpers.inspected_run import MEASURES, STEPS, choose, look_into, write_census

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM and "CI" not in os.environ, reason="there is no Chromium here")
SECONDS, BYTES = 3.0, 5_000_000
ROW = 240 / 31
"""Height of a layer in a figure of 31 of them."""
SOME = [
    *MEASURES[:7],
    ("geometry", "overlap", "last"),
    ("geometry", "id_gride", "picture"),
    ("drift", "drift_overlap", "picture"),
    ("geometry", "my_own_measure", "picture"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"]
AXE = (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
PROBLEMS = """async () => (await axe.run(document, {resultTypes: ['violations']})).violations
  .map(v => `${v.id}: ${v.nodes.slice(0, 3).map(n => n.html.slice(0, 160)).join(' | ')}`)"""
WAKE_ALL = """() => {
  for (const box of document.querySelectorAll('details')) box.open = true;
  for (const plot of document.querySelectorAll('[data-chart]'))
    for (const kind of ['pointermove', 'pointerleave']) plot.dispatchEvent(new PointerEvent(kind));
}"""
ALL_LIVE = "() => [...document.querySelectorAll('[data-chart]')].every(plot => plot.dataset.live)"


def trained_run(root, name, late=0.0):
    """A run with all that a report may hold."""
    run = look_into(write_census(RunDirectory.create(root, name)), measures=SOME)
    choose(run)
    append_layers(run.layers, [*traced_rows(500, ("mlp",), layers=30), *effects(500, layers=30)])
    write_json(run.path / "traces.json", [trace_of(layers=30)])
    run.config.write_text(f"model: {{lr: {1e-4 + late}, backbone: nano/smolvlm}}\n")
    keys = ("type", "n", "before", "after", "majority", "no_image")
    rows = [("colour", 600, 0.1, 0.9 - late, 0.3, 0.35), ("all", 600, 0.15, 0.8 - late, 0.3, 0.35)]
    write_json(run.evaluation, {"split": "test", "rows": [dict(zip(keys, row, strict=True)) for row in rows]})
    with run.metrics.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "train/loss", "val/loss"])
        writer.writerows([0, i, 3 / (i + 1), 2 / (i + 1) if i % 10 == 0 else ""] for i in range(100))
    return run


def checked():
    """What ``check`` finds of two sources, one with lost rows; one sample without a picture and one with ten."""
    tokens = {"min": 5, "median": 50.0, "p95": 900.0, "max": 1200}
    kinds = ("text", "image", "supervised", "total")
    lengths = {**dict.fromkeys(kinds, tokens), "measured": 90, "over_max_length": {"cut": 0.1, "dropped": 0.05}}
    source = {"split": "train", "path": "a.json", "shape": "LLaVA (conversations: from/value)", "read": 100, "cut": 3}
    good = {**source, "name": "good", "used": 100, "dropped": 0, "reasons": {}, "examples": {}, "ignored": {}}
    words = {"a_very_long_name_of_a_column_without_a_blank_" * 3: 7}
    bad = {**source, "name": "bad" * 30, "used": 90, "dropped": 10, "reasons": {"too long": 10}, "ignored": words}
    bad["examples"] = {"too long": "a.json:17: too long: image tokens up to 15586, the limit is 2048"}
    sample = {"id": "0", "split": "train", "source": "good", "origin": "a.json:1", "tokens": dict.fromkeys(kinds, 9)}
    overlap = {"num_rows": 9, "rows": 1, "pictures": 2, "examples": [["val.json:1", "a.json:2"]]}
    found = {
        "rows": {"read": 200, "used": 190, "dropped": 10},
        "error": "10 of 200 rows of data.train cannot be used",
        "max_length": 2048,
        "lengths_are_exact": False,
        "sources": [good, bad],
        "splits": {"train": {"lengths": lengths}, "val": {"lengths": {}}},
        "duplicates": {"within": {"train": 1, "val": 0}, "with_train": {"val": overlap}},
        "samples": [{**sample, "images": []}, {**sample, "images": [[640, 480]] * 10}],
    }
    parts = [("context", "USER: What?\n" + "x" * 500), ("learned", "A thing.</s>"), ("cut", "and so on")]
    pictures = [[], [Image.new("RGB", (640, 480), "orange")] * 10]
    return found, [parts, parts], pictures


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    one, other = trained_run(root, "middle"), trained_run(root, "late", 0.2)
    check = write_check_page(root / "check.html", *checked())
    return {"run": write_report(one.path), "comparison": write_report(one.path, other.path), "check": check}


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "CI needs Chromium: see scripts/browser.sh"
    with sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def opened(browser, pages):
    """Open a page; an error on the console, or a request, fails the test at its end."""
    said, contexts = [], []

    def open_page(which="run", width=1280, theme="light", **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: message.type == "error" and said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:", "blob:")) or said.append(asked.url))
        page.goto(pages.get(which, which).as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def chart(page, title):
    """The live chart under a heading."""
    figure = page.locator("figure", has=page.get_by_role("heading", name=title, exact=True)).first
    figure.scroll_into_view_if_needed()
    figure.locator(".plot[data-live]").wait_for()
    return figure


def over(page, figure, x, y):
    """Move the pointer to a place of the drawing, in the pixels of a figure 360 wide."""
    box = figure.locator(".plot svg").first.bounding_box()
    scale = box["width"] / 360
    page.mouse.move(box["x"] + x * scale, box["y"] + y * scale)


def all_live(page):
    """Open all details and wake every chart; returns how many there are."""
    page.evaluate(WAKE_ALL)
    page.wait_for_function(ALL_LIVE, timeout=60_000)
    return page.locator("[data-live]").count()


@pytest.mark.parametrize("which", ["run", "comparison", "check"])
def test_no_rule_of_accessibility_is_broken(opened, which):
    """With every chart live and all details open, in both themes, on a phone and on a screen."""
    page = opened(which)
    assert all_live(page) > 20 or which == "check"
    page.evaluate(AXE)
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            assert page.evaluate(PROBLEMS) == [], (width, theme)


@pytest.mark.parametrize("which", ["run", "comparison", "check"])
def test_it_is_quick_and_small(opened, pages, which):
    page = opened(which)
    assert float(page.get_attribute("html", "data-ready")) < 1000 * SECONDS
    assert pages[which].stat().st_size < BYTES


def test_the_page_of_a_check_shows_rows_lengths_and_samples(opened):
    page = opened("check", width=390)
    assert page.locator("mark").all_inner_texts() == ["A thing.</s>"] * 2
    assert page.locator("del").all_inner_texts() == ["and so on"] * 2
    assert page.locator("article img").count() == 8
    assert "and 2 more" in page.locator("article").nth(1).inner_text()
    assert "10 of 200 rows" in page.locator("#error").inner_text()
    assert "measured as one" in page.locator("#lengths").inner_text()


def test_pointing_at_a_layer_says_its_numbers_and_marks_it_everywhere(opened):
    page = opened()
    first, second = chart(page, "Entailment, hard"), chart(page, "Entailment, random")
    over(page, first, 280, 20 + 15.5 * ROW)  # layer 14 of -1 to 29 is the sixteenth row from the top
    said = page.locator("#readout").inner_text()
    assert said.startswith("layer 14")
    assert "chance 50\u00a0%, N 240" in said
    for figure in (first, second):
        assert figure.locator(".hover_marks path").count() == 2  # in the heat map and in the profile


def test_the_keyboard_reads_a_chart_too(opened):
    page = opened()
    chart(page, "Entailment, hard").locator(".plot").focus()
    for _ in range(2):
        page.keyboard.press("ArrowUp")
    assert page.locator("#said").text_content().startswith("layer 0")
    chart(page, "Loss").locator(".plot").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#said").text_content().startswith("step 0, train")


def test_the_slider_draws_the_profiles_of_its_step(opened):
    page = opened()
    assert page.locator("#step").input_value() == "5"
    assert page.locator("#step-words").inner_text() == f"step {STEPS[5]}"  # as it is drawn: the last
    figure = chart(page, "Entailment, hard")
    line = figure.locator(".lines_marks path[stroke-width='2']")
    assert line.count() == 0
    page.locator("#step").fill("2")
    line.first.wait_for(state="attached")
    assert page.locator("#step-words").inner_text() == f"step {STEPS[2]}"
    assert f"now step {STEPS[2]}" in figure.locator(".keys").inner_text()
    drawn = line.first.get_attribute("d")
    page.locator("#step").fill("3")
    page.wait_for_function(
        "d => document.querySelector('.lines_marks path[stroke-width=\"2\"]').getAttribute('d') !== d", arg=drawn
    )
    page.locator("#step").fill("5")
    line.first.wait_for(state="detached")


def test_layers_chosen_in_one_chart_are_compared_in_all(opened):
    page = opened()
    first, second = chart(page, "Entailment, hard"), chart(page, "Entailment, random")
    first.scroll_into_view_if_needed()
    over(page, first, 280, 20 + 10.5 * ROW)
    page.mouse.down()
    over(page, first, 280, 20 + 12.5 * ROW)
    over(page, first, 280, 20 + 15.5 * ROW)
    page.mouse.up()
    ends = int(page.locator("#from").input_value()), int(page.locator("#to").input_value())
    assert ends == (14, 19)
    assert second.locator(".brush_marks path").count() == 2
    assert f"Mean of layers {ends[0]}–{ends[1]}" in second.locator(".compared").inner_text()
    page.locator("#clear").click()
    assert page.locator("#from").input_value() == ""
    page.locator("#to").click()
    page.keyboard.type("8")
    page.locator("#from").click()
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    assert "Mean of layers 5–8" in second.locator(".compared").inner_text()
    page.locator("#clear").click()
    second.locator(".brush_marks path").first.wait_for(state="detached")


def test_files_of_a_chart_hold_its_numbers(opened, pages, tmp_path):
    page = opened()
    figure = chart(page, "Entailment, hard")
    saved = {}
    for kind in ("CSV", "SVG", "PNG"):
        with page.expect_download() as download:
            figure.locator(".tools button", has_text=kind).click()
        saved[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(saved[kind])
    with saved["CSV"].open(encoding="utf-8") as file:
        shown = {(int(r["step"]), int(r["layer"])): r for r in csv.DictReader(file)}
    with (pages["run"].parent / "layers.csv").open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if (r["measure"], r["site"]) == ("entailment/hard", "last")]
    assert len(rows) == len(shown) == 6 * 31
    for row in rows:
        own = shown[int(row["step"]), int(row["layer"])]
        for name in ("value", "low", "high"):
            assert (float(own[name]) if own[name] else None) == (
                pytest.approx(float(row[name]), rel=1e-5) if row[name] else None
            )
    assert ET.parse(saved["SVG"]).getroot().tag.endswith("svg")
    words = saved["SVG"].read_text(encoding="utf-8")
    assert "Entailment, hard" in words
    assert "step 500 83.3" in words
    assert saved["PNG"].read_bytes().startswith(base64.b64decode("iVBORw0KGgo="))
    figure.locator(".tools button", has_text="Table").click()
    assert figure.locator(".written tbody tr").count() == 6 * 31


def test_tables_are_sorted_and_the_theme_is_switched(opened):
    page = opened("comparison")
    table = page.locator("#runs table").first
    heading = table.locator("th", has_text="Exact match")
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert [row.split("\t")[0] for row in table.locator("tbody tr").all_inner_texts()] == ["middle", "late"]
    heading.locator("button").click()
    assert [row.split("\t")[0] for row in table.locator("tbody tr").all_inner_texts()] == ["late", "middle"]
    color = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(color)
    for _ in range(2):
        page.locator("#theme").click()
    assert page.locator("#theme").inner_text() == "Theme: dark"
    assert page.evaluate(color) != light


def test_a_finger_reads_a_chart(opened):
    page = opened(width=390, has_touch=True, is_mobile=True)
    figure = chart(page, "Entailment, hard")
    box = figure.locator(".plot svg").first.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.4)
    readout = page.locator("#readout")
    assert readout.is_visible()  # also when the finger is lifted
    assert readout.inner_text().startswith("layer ")
    figure.get_by_role("heading").tap()
    assert not readout.is_visible()


def test_without_javascript_drawings_and_tables_stand(opened):
    page = opened(java_script_enabled=False)
    assert page.locator("#inside .charts > figure .plot svg .lines_marks").count() > 8
    tables = page.locator("noscript details.written")
    assert tables.count() > 30
    assert not page.locator("#workbar").is_visible()
    assert not page.locator("#theme").is_visible()
    tables.first.locator("summary").click()
    assert tables.first.locator("tbody tr").count() > 10


CALLBACKS = """trainer:
  callbacks:
    - ProbingCallback
    - GeometryCallback
    - DriftCallback
    - {class_path: CausalCallback, init_args: {count: 3, parts: [ablation, flow]}}
"""


def test_the_report_of_a_real_run_works(opened, family, data, probes, tmp_path):
    callbacks = tmp_path / "callbacks.yaml"
    callbacks.write_text(CALLBACKS)
    paths = {"model.backbone.path": family("llava"), "data.train": data["train"], "data.val": data["val"]}
    paths |= {"data.probes": probes, "run.root": tmp_path, "run.name": "real", "run.wandb": "off"}
    told = [part for name, value in paths.items() for part in (f"--{name}", str(value))]
    fragments = ("trainer/cpu.yaml", "tuning/intermediate.yaml", str(callbacks))
    asked = [part for path in fragments for part in ("-c", path)]
    assert main(["fit", *asked, *told, "--trainer.max_steps", "2", *QUICK]) == 0
    page = opened(tmp_path / "real" / "report.html")
    assert all_live(page) > 20
    for part in ("inside", "causes"):
        figure = page.locator(f"#{part} figure", has=page.locator("h4")).first
        figure.scroll_into_view_if_needed()
        over(page, figure, 300, 20 + 14 * 2.5)
        assert page.locator("#readout").inner_text().startswith("layer 1")  # of -1 to 3, 14 pixels each
        assert figure.locator(".hover_marks path").count() > 0
    page.evaluate(AXE)
    assert page.evaluate(PROBLEMS) == []
