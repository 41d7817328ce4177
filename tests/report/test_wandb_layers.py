"""Layers at W&B: few panels whatever is measured, each row sent once, and no fault of theirs reaches the run."""

import json
import re
from dataclasses import asdict, replace

import pytest
import wandb
from PIL import Image

from lightning_mm.core.layer_table import append_layers
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report import wandb_layers
from lightning_mm.report.figures import theme
from lightning_mm.report.figures.class_maps import class_maps
from lightning_mm.report.tables.panels import TrainedLayers
from lightning_mm.report.wandb import OnlineLogger
from tests.helpers.causal_files import effects, traced_rows
from tests.helpers.page import marks
from tests.helpers.wandb_files import history, records, warnings_of

pytestmark = pytest.mark.usefixtures("nobody_is_logged_in")

SITES = ["last", "image", "text"]
EVERYTHING = [
    *[
        ("probing", name, site)
        for site in SITES
        for name in ("entailment/hard", "entailment/random", "objects", "position")
    ],
    *[("probing", f"{name}/{part}", "last") for name in ("objects", "count") for part in ("text_only", "selectivity")],
    *[
        ("geometry", name, site)
        for site in SITES
        for name in ("overlap", "cka", "gap", "gap_auc", "id_gride", "svcca", "rsa")
    ],
    *[("geometry", f"own_{i}", "last") for i in range(30)],
    *[("drift", name, site) for site in SITES for name in ("drift_overlap", "drift_cka", "drift_cosine")],
]


def test_layers_are_few_panels_however_many_measures_there_are(tmp_path, caplog, rows_of, write_census):
    run = write_census(RunDirectory(tmp_path))
    logger = OnlineLogger(tmp_path, mode="offline", run_id="abcd1234")
    for step in (0, 20):
        rows = rows_of(step, EVERYTHING)
        append_layers(run.layers, rows)
        logger.log_layers([asdict(row) for row in rows])
    logger.close()
    wandb.teardown()

    found = [row for row in history(records(tmp_path)) if any(key.startswith("layer") for key in row)]
    panels = {key.split("/")[0] + "/" + key.split("/")[1] for row in found for key in row if key.startswith("layer")}
    assert len(panels) <= 9 + 9 + 6  # a table and a map for each main quantity, a table for each question
    assert {"layers/cka", "layer_maps/cka", "layers/entailment_hard", "layers/more_other"} <= panels
    assert [row["trainer/global_step"] for row in found] == ["0", "20"]
    assert warnings_of(caplog) == []


def test_each_inspection_sends_its_own_rows_only_and_the_map_shows_all(tmp_path, caplog, rows_of, write_census):
    write_census(RunDirectory(tmp_path))
    logger = OnlineLogger(tmp_path, mode="offline")
    for step in (0, 20, 100):
        rows = rows_of(step, [("geometry", "overlap", "last")])
        append_layers(tmp_path / "layers.csv", rows)
        logger.log_layers(rows)
    logger.close()
    sent = [
        json.loads(path.read_text()) for path in tmp_path.glob("wandb/offline-run-*/files/media/table/layers/*.json")
    ]
    steps = sorted({row[0] for row in table["data"]} for table in sent)
    assert sorted(map(tuple, steps)) == [(0,), (20,), (100,)]
    assert all(len(table["data"]) == 31 for table in sent)
    assert sent[0]["columns"][:4] == ["step", "layer", "measure", "site"]
    maps = sorted(tmp_path.glob("wandb/offline-run-*/files/media/images/layer_maps/*.png"))
    widths = [len(columns_of(path)) for path in maps]
    assert sorted(widths) == [1, 2, 3]
    assert warnings_of(caplog) == []


def columns_of(path):
    """The runs of equal color along the row of the highest layer: one per step where steps differ."""
    with Image.open(path) as picture:
        line = [picture.getpixel((x, 88)) for x in range(2 * 42 + 2, 2 * (42 + 180) - 2)]
    kinds = [pixel for i, pixel in enumerate(line) if i == 0 or pixel != line[i - 1]]
    return [pixel for pixel in kinds if pixel != (255, 255, 255)]


def test_what_trains_is_marked_in_teal_where_it_is(tmp_path, rows_of, write_census):
    run = write_census(RunDirectory(tmp_path))
    (picture,) = wandb_layers.pictures(run.path, rows_of(0, [("geometry", "cka", "last")])).values()
    teal = [y for y in range(picture.height) if picture.getpixel((68, y)) == (13, 111, 115)]
    row = 240 / 31
    top, bottom = 2 * (40 + (29 - 14) * row), 2 * (40 + (30 - 7) * row)
    assert (teal[0], teal[-1]) == (pytest.approx(top, abs=1), pytest.approx(bottom, abs=2))  # whole pixels
    assert len(teal) == teal[-1] - teal[0] + 1


def test_causes_are_one_panel_per_quantity_and_the_traces_one_picture(tmp_path, caplog, write_census):
    run = write_census(RunDirectory(tmp_path))
    logger = OnlineLogger(tmp_path, mode="offline", run_id="abcd1234")
    rows = [*traced_rows(layers=30), *effects(layers=30)]
    append_layers(run.layers, rows)
    logger.log_layers(rows)
    logger.close()
    wandb.teardown()
    found = [row for row in history(records(tmp_path)) if any(key.startswith("layer") for key in row)]
    panels = {"/".join(key.split("/")[:2]) for row in found for key in row if key.startswith("layer")}
    main = {"flow", "knockout", "ablation", "transplant"}
    assert panels == {f"layers/{name}" for name in main} | {f"layer_maps/{name}" for name in main} | {
        "layers/more_causal",
        "layer_maps/trace",
    }
    assert warnings_of(caplog) == []


def test_the_map_of_traces_shows_the_effect_where_it_is(tmp_path):
    picture = wandb_layers.pictures(tmp_path, traced_rows())["layer_maps/trace"]
    (first, *_) = class_maps(traced_rows())
    figure = first.figure(TrainedLayers(), headed=True)
    (ring,) = marks(figure.svg(), "peak")
    x, y = map(float, re.match(r"translate\(([-\d.]+),([-\d.]+)\)", ring.get("transform")).groups())
    at = (round(2 * (figure.origin[0] + x)), round(2 * (figure.origin[1] + y)))
    assert picture.getpixel(at) == theme.SIGNED_LIGHT[-1]
    assert picture.width == 3 * round(2 * figure.size[0])


@pytest.mark.parametrize("broken", ["census.json", "layers.csv", "rows"])
def test_layers_that_cannot_be_shown_turn_w_and_b_off_and_nothing_else(tmp_path, caplog, rows_of, broken):
    if broken != "rows":
        (tmp_path / broken).mkdir()
    logger = OnlineLogger(tmp_path, mode="offline")
    rows = rows_of(0, [("geometry", "cka", "last")])
    for _ in range(3):
        logger.log_layers(rows if broken != "rows" else [*rows, {"step": "x"}])
    assert logger.mode == "off"
    assert len(warnings_of(caplog)) == 1
    logger.close()


def test_one_table_compares_whole_runs(tmp_path, caplog, rows_of, write_census):
    """Runs of other measures and looks have the same key and the same first columns; undefined values are empty."""
    tables = {}
    for name, steps in {"a": (0, 20), "b": (0, 20, 40)}.items():
        (tmp_path / name).mkdir()
        run = write_census(RunDirectory(tmp_path / name))
        logger = OnlineLogger(run.path, mode="offline", name=name)
        looks = [row for step in steps for row in rows_of(step, EVERYTHING[:9])]
        rows = [replace(looks[0], value=None, undefined="one class only"), *looks[1:]]
        append_layers(run.layers, rows)
        logger.log_comparison(f"IntermediateOnly('{name}')")
        logger.close()
        (path,) = run.path.glob("wandb/offline-run-*/files/media/table/layer_comparison_*.json")
        table = json.loads(path.read_text())
        head = ["run", "policy", "step", "layer", "site", "trained"]
        assert table["columns"][:6] == head
        assert {"entailment_hard", "objects"} < set(table["columns"])
        keys = [tuple(row[2:5]) for row in table["data"]]
        assert len(keys) == len(set(keys)) == len({(row.step, row.layer, row.site) for row in rows})
        assert {row[2] for row in table["data"]} == set(steps)
        census = json.loads(run.census.read_text())
        assert {row[3] for row in table["data"] if row[5]} == set(census["layers"]["trained"])
        by_key = {
            key: dict(zip(table["columns"], row, strict=True)) for key, row in zip(keys, table["data"], strict=True)
        }
        for row in rows:  # the file keeps six digits
            found = by_key[row.step, row.layer, row.site][row.measure.replace("/", "_")]
            assert found is None if row.value is None else found == pytest.approx(row.value, rel=1e-5)
        assert {(row[0], row[1]) for row in table["data"]} == {(name, f"IntermediateOnly('{name}')")}
        tables[name] = table["columns"]
    assert tables["a"] == tables["b"]
    assert warnings_of(caplog) == []


def test_a_run_without_looks_has_no_table_of_layers(tmp_path, caplog):
    logger = OnlineLogger(tmp_path, mode="offline")
    logger.log_comparison("Full()")
    assert logger.mode == "offline"
    logger.close()
    assert not list(tmp_path.glob("wandb/offline-run-*/files/media/table"))
    assert warnings_of(caplog) == []
