"""``check`` on the command line: tables, JSON and page; and what a fit on the same options then does."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_mm.__main__ import main
from tests.helpers.cli import QUICK, Fit
from tests.helpers.data import Data, Family
from tests.helpers.page import Page

LOST = ("--data.max_bad_fraction", "0.6")


def checked(fit: Fit, folder: Path, *more: str) -> dict[str, Any]:
    assert fit("--json", str(folder / "check.json"), *more, verb="check") == 0
    told: dict[str, Any] = json.loads((folder / "check.json").read_text())
    return told


def spoil(data: Data) -> None:
    """Of train, lose a picture, an answer and two rows to the template and to the length; of val, a picture."""
    rows = json.loads(data["train"].read_text())
    rows[0]["image"] = "missing.png"
    del rows[1]["conversations"][1:]
    rows[2]["conversations"][1]["value"] = "<pad>"
    rows[3]["conversations"][0]["value"] = "<image>\n" + "long " * 3000
    rows[4]["conversations"][-1]["value"] = "and on " * 3000
    data["train"].write_text(json.dumps(rows))
    rows = json.loads(data["val"].read_text())
    (data["val"].parent / rows[0]["image"]).write_bytes(b"broken")
    data["val"].write_text(json.dumps(rows))


def test_what_is_dropped_is_what_the_ledger_of_a_fit_holds(fit: Fit, data: Data, tmp_path: Path) -> None:
    spoil(data)
    told = checked(fit, tmp_path, *LOST)
    epoch = ("--trainer.max_steps", "-1", "--trainer.max_epochs", "1", "--data.batch_size", "1")
    assert fit(*LOST, *epoch, *QUICK[:4], "--run.name", "spoiled") == 0
    lines = (tmp_path / "runs" / "spoiled" / "ledger.jsonl").read_text().splitlines()
    ledger = [json.loads(line) for line in lines]
    for split in ("train", "val"):
        dropped = [each for each in ledger if each["split"] == split and each["kind"] == "dropped"]
        counts: dict[str, int] = {}
        for each in dropped:
            category = each["reason"].partition(":")[0]
            counts[category] = counts.get(category, 0) + 1
        here = told["splits"][split]
        assert here["reasons"] == counts
        assert here["rows"]["dropped"] == len(dropped)
        assert here["rows"]["read"] == here["rows"]["used"] + here["rows"]["dropped"]
        first = [text for source in told["sources"] if source["split"] == split for text in source["examples"].values()]
        assert set(first) <= {f"{each['origin']}: {each['reason']}" for each in dropped}
    assert told["splits"]["train"]["rows"] == {"read": 12, "used": 8, "dropped": 4}
    assert sum(each["kind"] == "cut" for each in ledger) == told["sources"][0]["cut"] == 1


def test_all_that_was_promised_is_in_the_file(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = checked(fit, tmp_path, "--samples", "2", "--html", str(tmp_path / "check.html"))
    assert told["rows"] == {"read": 20, "used": 20, "dropped": 0}
    assert told["reasons"] == {}
    assert told["ignored_columns"] == []
    for kind in ("text", "image", "supervised", "total"):
        assert list(told["lengths"][kind]) == ["min", "median", "p95", "max"]
    assert len(told["samples"]) == 6
    assert {"id", "prompt", "supervised", "images"} <= set(told["samples"][0])
    printed = capsys.readouterr().out
    assert "⟦" in printed
    assert "\x1b" not in printed
    page = Page((tmp_path / "check.html").read_text())
    assert page.tags.count("article") == 6
    assert page.tags.count("img") == 6
    assert all(value.startswith("data:image/") for name, value in page.attributes if name == "src")
    for sample in told["samples"]:
        for text in sample["supervised"]:
            assert text in page.words
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "idefics3"])
def test_other_families(name: str, fit: Fit, family: Family, tmp_path: Path) -> None:
    told = checked(fit, tmp_path, "--model.backbone.path", str(family(name)))
    assert told["rows"]["used"] == 20
    assert told["lengths"]["image"]["min"] > 0


def test_more_than_may_be_lost_is_told_and_then_an_error(
    fit: Fit, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(data)
    files = ("--json", str(tmp_path / "check.json"), "--html", str(tmp_path / "check.html"))
    assert fit(*files, verb="check") == 1
    out, err = capsys.readouterr()
    assert "Why rows are dropped" in out
    assert "error: 4 of 12 rows of data.train cannot be used, the limit is 1.00%." in err
    told = json.loads((tmp_path / "check.json").read_text())
    assert told["error"].startswith("4 of 12 rows")
    assert "A fit on this data stops" in (tmp_path / "check.html").read_text()
    assert fit(verb="fit") == 2


def test_without_a_model(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--data.train", str(data["train"]), "--json", str(tmp_path / "check.json")]) == 0
    told = json.loads((tmp_path / "check.json").read_text())
    assert told["rows"] == {"read": 12, "used": 12, "dropped": 0}
    assert told["lengths"] == {}
    assert "no model is named" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.trian", "x.json"], "Did you mean --data.train"),
        (["--data.train", "nowhere.json"], "nowhere.json"),
        (["--data.train", "empty.json"], "empty"),
        ([], "There is no data to check."),
        (["--samples", "-3"], "samples is -3"),
        (["--samples", "3", "--model.backbone.path", "/no/model"], "there is no folder /no/model."),
    ],
)
def test_mistakes(
    options: list[str], words: str, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.json").touch()
    given = [*options, *(["--data.train", str(data["train"])] if "--samples" in options else [])]
    assert main(["check", *given]) in (1, 2)
    assert words in capsys.readouterr().err


def test_max_length_from_the_data(fit: Fit, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auto = ("--data.max_length", "auto")
    told = checked(fit, tmp_path, *auto, "--data.train", str(data["train"]))
    longest = told["lengths"]["total"]["max"]
    assert told["max_length"] == longest
    assert told["splits"]["train"]["lengths"]["over_max_length"] == {"cut": 0, "dropped": 0}
    assert fit(*auto, *QUICK, "--run.name", "first") == 0
    assert f"data.max_length: {longest:.0f} (auto: the longest of 12 training rows)" in capsys.readouterr().err
    run = tmp_path / "runs" / "first"
    assert f"max_length: {longest:.0f}\n" in (run / "config.yaml").read_text()
    assert fit(*auto, *QUICK, "--run.name", "second", "--trainer.max_steps", "6", "--ckpt_path", str(run)) == 0
    assert "auto: as the checkpoint has it" in capsys.readouterr().err
    settings = json.loads((tmp_path / "runs" / "second" / "hyperparameters.json").read_text())
    assert settings["data.max_length"] == longest
    assert fit("--data.max_length", "car", *QUICK) == 2


def test_a_fit_begins_with_a_row_of_each_source(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*QUICK, "--run.name", "first") == 0
    began = capsys.readouterr().err
    assert began.count("A row of train, learned between ⟦ ⟧: train.json") == 1
    assert "⟦ It is" in began
    assert fit(*QUICK, "--run.name", "streamed", "--data.streaming", "true", "--data.max_length", "auto") == 0
    began = capsys.readouterr().err
    assert began.count("A row of train, learned between ⟦ ⟧: train.json") == 1
    assert "data.max_length: 4096 (auto: the model's context; training rows are streamed)" in began
    resumed = ("--trainer.max_steps", "6", "--ckpt_path", str(tmp_path / "runs" / "first"))
    assert fit(*QUICK, "--run.name", "second", *resumed) == 0
    assert "A row of" not in capsys.readouterr().err
