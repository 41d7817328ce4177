"""The page that compares runs: its order, its numbers against the runs' files, and runs that lack something."""

import csv

import pytest

from lightning_mm.__main__ import main
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_json
from lightning_mm.core.layer_table import append_layers
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report.html import write_report
from tests.helpers.inspected_run import TOTAL, rows_of, write_census
from tests.helpers.page import Page

SOME = [("probing", "entailment/hard", "last"), ("geometry", "overlap", "last"), ("drift", "drift_overlap", "image")]

BAD_WILSON = (0.46011986, 0.53988014)
"""Of 300 in 600: statsmodels 0.14, ``proportion_confint(300, 600, method="wilson")``. Its interval of the difference
from 540 in 600, ``confint_proportions_2indep(300, 600, 540, 600, method="newcomb")``, is -0.4453 to -0.3521."""


def compared_run(root, name, right=480, seed=0, layers=True):
    """A run that was tested on 600 questions, and looked into at steps 0 and 100."""
    run = write_census(RunDirectory.create(root, name))
    run.config.write_text(f"model:\n  lr: {1 + seed}e-4\n  backbone: nano\n")
    row = {"type": "all", "n": 600, "before": 0.1, "after": right / 600, "majority": 0.3, "no_image": 0.3}
    write_json(run.evaluation, {"split": "test", "rows": [row | {"type": "colour", "n": 60}, row]})
    with run.metrics.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "train/loss"])
        writer.writerows([0, step, (3 + seed) / (step + 1)] for step in range(0, 30, 3))
    for step in (0, 100) if layers else ():
        append_layers(run.layers, rows_of(step, SOME, seed=seed, steps=(0, 100)))
    return run


def page_of(*runs, **options):
    return Page(write_report(*(run.path for run in runs), **options).read_text(encoding="utf-8"))


def chart_of(page, title):
    return next(chart for chart in page.charts if chart["title"] == title)


def rows_in(chart):
    return [dict(zip(chart["columns"], row, strict=True)) for row in zip(*chart["values"], strict=True)]


def test_numbers_are_those_of_the_files(tmp_path):
    runs = [compared_run(tmp_path, name, seed=seed) for seed, name in enumerate(("b-first", "a-second", "third"))]
    page = page_of(*runs)
    for title, measure in (("Entailment, hard", "entailment/hard"), ("Shared neighbours", "overlap")):
        shown = rows_in(chart_of(page, title))
        assert list(dict.fromkeys(row["run"] for row in shown)) == [
            "b-first",
            "a-second",
            "third",
        ]  # as they were named
        for run in runs:
            with run.layers.open(encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row["measure"] == measure and row["step"] == "100"]
            own = {row["layer"]: row for row in shown if row["run"] == run.name}
            known = [row for row in rows if row["value"]]
            assert len(known) == len(own) == TOTAL
            for row in known:
                for name in ("value", "low", "high"):
                    assert own[int(row["layer"])][name] == pytest.approx(float(row[name]), rel=1e-5)
    losses = rows_in(chart_of(page, "Training loss"))
    for seed, run in enumerate(runs):
        drawn = [(row["step"], row["nats per token"]) for row in losses if row["series"] == run.name]
        assert drawn == [(step, pytest.approx((3 + seed) / (step + 1), rel=1e-5)) for step in range(0, 30, 3)]


def test_it_says_which_run_is_better_and_what_differs(tmp_path):
    good = compared_run(tmp_path, "good", right=540)
    alike, bad = compared_run(tmp_path, "alike", right=537, seed=1), compared_run(tmp_path, "bad", right=300, seed=2)
    page = page_of(good, alike, bad)
    assert "good answers most questions exactly: 90 %, more than bad; not told apart from alike." in page.text
    assert "lower (-45 to -35 points)" in page.text
    assert "The intervals of exact match separate no two runs: good 90 % and alike 89.5 %." in page_of(good, alike).text
    assert "model.lr" in page.text
    assert "model.backbone" not in page.text  # alike in all
    shares = {(row["run"], row["question type"]): row for row in rows_in(chart_of(page, "Exact match"))}
    assert (shares["bad", "all"]["low"], shares["bad", "all"]["high"]) == pytest.approx(BAD_WILSON, abs=1e-5)


def test_intervals_apart_are_counted_by_layer(tmp_path):
    one, other = compared_run(tmp_path, "one", layers=False), compared_run(tmp_path, "other", layers=False)
    rows = rows_of(0, SOME[:1])
    append_layers(one.layers, rows)
    append_layers(other.layers, rows_of(0, SOME[:1]))
    assert "Told apart from one, over all layers: other nowhere" in page_of(one, other, out=tmp_path / "same.html").text
    moved = [
        type(row)(**{**vars(row), "value": row.value + 0.3, "low": row.low + 0.3, "high": row.high + 0.3})
        if row.layer in (7, 8, 20)
        else row
        for row in rows
    ]
    third = compared_run(tmp_path, "third", layers=False)
    append_layers(third.layers, moved)
    said = "Told apart from one, over all layers: other nowhere; third at 3 of 30 layers (7–8, 20)"
    assert said in page_of(one, other, third).text


def test_a_run_without_layers_costs_only_its_lines(tmp_path):
    whole, bare, third = (
        compared_run(tmp_path, "whole"),
        compared_run(tmp_path, "bare", layers=False),
        compared_run(tmp_path, "third", seed=1),
    )
    page = page_of(whole, bare)
    assert "their layers cannot be compared" in page.text
    assert "layers.csv" not in page.text  # a run need not have been looked into
    shown = rows_in(chart_of(page_of(whole, bare, third), "Entailment, hard"))
    assert {row["run"] for row in shown} == {"whole", "third"}
    whole.evaluation.unlink()
    bare.evaluation.write_text("{")
    page = page_of(whole, bare, out=tmp_path / "untested.html")
    assert "whole: The run has no evaluation.json." in page.text
    assert "bare: evaluation.json" in page.text
    assert "None of these runs was tested." in page.text


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = [compared_run(tmp_path / root, "same", seed=seed) for seed, root in enumerate(("lora", "full"))]
    page = page_of(*runs)
    assert "lora/same against full/same" in page.text
    assert {row["run"] for row in rows_in(chart_of(page, "Entailment, hard"))} == {"lora/same", "full/same"}


def test_runs_of_different_depth_share_an_axis(tmp_path):
    deep, flat = compared_run(tmp_path, "deep"), compared_run(tmp_path, "flat", layers=False)
    append_layers(flat.layers, [row for row in rows_of(0, SOME) if row.layer < 6])
    chart = chart_of(page_of(deep, flat), "Entailment, hard")
    assert (chart["live"]["first"], chart["live"]["last"]) == (-1, TOTAL - 1)
    layers = {name: [row["layer"] for row in rows_in(chart) if row["run"] == name] for name in ("deep", "flat")}
    assert layers == {"deep": list(range(TOTAL)), "flat": list(range(6))}


@pytest.mark.parametrize("names", [("here", "gone"), ("gone", "here"), ("here", "here")])
def test_a_run_that_cannot_be_compared_is_one_error(tmp_path, capsys, names):
    compared_run(tmp_path, "here", layers=False)
    with pytest.raises(UserError):
        write_report(*(tmp_path / name for name in names))
    assert main(["report", *(str(tmp_path / name) for name in names)]) != 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    assert said.err.count("Error") + said.err.count("error") <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]


def test_a_page_holds_twelve_runs(tmp_path):
    runs = [RunDirectory.create(tmp_path, f"run{i}") for i in range(13)]
    with pytest.raises(UserError, match="13 runs are too many"):
        write_report(*(run.path for run in runs))
    page_of(*runs[:12])


def test_the_command_writes_beside_the_first_run(tmp_path, capsys):
    runs = [compared_run(tmp_path, name, layers=False) for name in ("one", "two")]
    assert main(["report", *(str(run.path) for run in runs)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "compare-one-two.html")
