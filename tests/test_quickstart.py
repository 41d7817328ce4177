"""The quickstart: its file on a tiny model, its numbers and words, its table, its picture, its script."""

import io
import json
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from lightning_mm.study.folder import Job, StudyFolder
from lightning_mm.study.run import run_study
from lightning_mm.study.settings import read_settings
from lightning_mm.verbs.export_model import export_model
from lightning_mm.verbs.plan import POLICIES
from tests.helpers.data import Family
from tests.helpers.study import make_study, plant_study

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
sys.path.append(str(SCRIPTS))

import quickstart_picture  # noqa: E402  (scripts are no package of ours)
import summary  # noqa: E402

STUDY = ROOT / "configs/study/quickstart.yaml"
SHELL = (SCRIPTS / "quickstart.sh").read_text(encoding="utf-8")


@pytest.fixture
def numbers() -> types.SimpleNamespace:
    return types.SimpleNamespace(**runpy.run_path(str(SCRIPTS / "readme_numbers.py"), run_name="numbers"))


def test_the_script_is_bash_and_names_what_exists() -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / "quickstart.sh")], check=True)
    named = set(re.findall(r"(?:scripts|configs)/[\w/.-]+\.(?:py|sh|yaml)", SHELL))
    assert {"scripts/summary.py", "scripts/ask.py", "configs/study/quickstart.yaml"} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_file_is_that_of_the_whole_study_but_for_what_it_leaves_out() -> None:
    """What trains is the same: only then does the quickstart show in small what the study measures."""
    small, whole = (read_settings(path) for path in (STUDY, ROOT / "configs/study/nano.yaml"))
    assert small.options == whole.options
    assert (small.lr, small.connector_lr, small.configs) == (whole.lr, whole.connector_lr, whole.configs)
    assert small.arms == {name: whole.arms[name] for name in ("connector", "middle")}
    assert {arm.tuning for arm in small.arms.values()} <= {type(policy).__name__ for policy in POLICIES}
    assert small.stage1 is None


def test_the_script_sets_what_the_file_has() -> None:
    steps, questions = (re.search(rf"^{name}=(\d+)", SHELL, re.M) for name in ("steps", "questions"))
    content = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    assert steps is not None
    assert questions is not None
    assert int(steps[1]) == content["stage2"]["steps"]
    assert int(questions[1]) == content["questions_per_type"]


@pytest.fixture
def tiny(family: Family, tmp_path: Path) -> StudyFolder:
    """The quickstart's file with the paths of a tiny model and data, two steps and one question of each type."""
    made = make_study(tmp_path / "data", family("llava"))
    content = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    files = {"data.train": made["options"]["data.train"], "data.probes": made["layers"]["probes"]}
    changed = {
        "model": made["model"],
        "configs": [str(ROOT / name) for name in content["configs"]],
        "options": content["options"] | files,
        "tests": {"known": made["tests"]["test"]},
        "facts": made["facts"],
        "layers": content["layers"] | {"probes": made["layers"]["probes"]},
    }
    short = {"stage2": {"steps": 2}, "questions_per_type": 3, "blind_per_type": 2, "text_chunks": 2, "text_tokens": 16}
    return run_study({**content, **changed, **short}, tmp_path / "out")


@pytest.mark.timeout(900)
def test_the_file_runs_and_its_numbers_are_told(tiny: StudyFolder, tmp_path: Path) -> None:
    found = summary.summarize(tiny.path, 60)
    rows = {row["type"]: row for row in found["rows"]}
    assert {kind: row["n"] for kind, row in rows.items()} == {"all": 6, "colour": 3, "yes_no": 3}
    assert (found["steps"], found["seconds"], found["precision"]) == (2, 60, "bf16-mixed")
    assert found["text"]["connector"] == found["text"]["before"] != found["text"]["middle"]
    assert "paired over 3 pictures" in found["gain"]
    assert any("entailment" in line for line in found["told"])
    assert any("objects" in line for line in found["told"])
    run = tiny.of_job(Job("middle", 0)) / "fit"
    assert (export_model(run, tmp_path / "model", verify=False) / "config.json").is_file()


def test_a_gain_and_none_are_told_apart(tmp_path: Path) -> None:
    gained = summary.summarize(plant_study(tmp_path / "gained", {"middle": 0.56}, text={"middle": 0.05}, seeds=1))
    assert gained["gain"].endswith("paired over 250 pictures): a gain.")
    assert summary.summarize(plant_study(tmp_path / "same", {}, seeds=1))["gain"].endswith(": no gain was found.")
    assert summary.summarize(plant_study(tmp_path / "less", {"middle": 0.3}))["gain"].endswith(": a loss.")
    everything = gained["rows"][0]
    assert everything["type"] == "all"
    assert everything["middle"]["low"] < everything["middle"]["value"] == pytest.approx(0.56, abs=0.04)
    assert everything["other"] == pytest.approx(0.2, abs=0.04)
    assert gained["text"]["middle"] - gained["text"]["before"] == pytest.approx(0.05)
    assert len(gained["against_before"]) == 2


def test_table_picture_and_documents_show_the_numbers(tmp_path: Path, numbers: types.SimpleNamespace) -> None:
    found = json.loads(json.dumps(summary.summarize(plant_study(tmp_path, {"middle": 0.56}, seeds=1), 600)))
    shown = Console(file=io.StringIO(), width=160)
    shown.print(summary.table(found))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert f"{100 * found['rows'][0]['middle']['value']:.0f} " in text
    assert "capitals without a picture" in text
    with Image.open(io.BytesIO(quickstart_picture.picture(found))) as drawn:
        assert drawn.width > 1200
        pixels = np.asarray(drawn.convert("RGB"))
    teal, gray = (int((pixels == color).all(-1).sum()) for color in colors("middle", "other"))
    assert teal / gray == pytest.approx(shares(found, "middle") / shares(found, "other"), rel=0.15)
    lines = numbers._table([("all types", found["rows"][0])], found)
    assert f"**{found['rows'][0]['middle']['value']:.0%}** |" in lines[2]


def colors(*entries: str) -> list[tuple[int, ...]]:
    named = [quickstart_picture.BARS[entry][1].lstrip("#") for entry in entries]
    return [tuple(bytes.fromhex(color)) for color in named]


def shares(found: dict[str, Any], entry: str) -> float:
    """What the lengths of a model's bars add up to."""
    given = [row[entry] for row in found["rows"]]
    return sum(each["value"] if isinstance(each, dict) else each for each in given)


def test_a_picture_of_the_test_is_found(tmp_path: Path) -> None:
    def row(image: str, kind: str) -> dict[str, Any]:
        return {"image": image, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "type": kind}]}

    file = tmp_path / "test.json"
    file.write_text(json.dumps([row("a.png", "count"), row("b.png", "category")]))
    assert summary.test_picture(file) == tmp_path / "b.png"
