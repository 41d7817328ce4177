"""lightning-mm trace: from a file of questions to maps, curves and a report; mistakes told."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_mm.__main__ import main
from lightning_mm.analysis.findings import Findings
from lightning_mm.core.estimate import Estimate
from lightning_mm.models.export.export import export_full
from lightning_mm.models.export.model_card import Provenance
from lightning_mm.verbs.trace import strongest_table
from tests.helpers.taught_models import KNOWN, Taught

LIGHT = ["--parts", "[trace,flow,pictures]", "--tracing.sites", "[mlp]"]


def row(word: str, **more: Any) -> dict[str, Any]:
    question = f"Which is {word} thing?"
    return {"id": word, "question": question, "image": "picture.png", "constraint": word, "answer": KNOWN[word], **more}


@pytest.fixture
def work(known: Callable[[str], Taught], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model that knows something, and questions about it."""
    one = known("llava")
    export_full(one.model, one.encoder.processor, tmp_path / "model", Provenance("tiny"))
    (tmp_path / "picture.png").write_bytes(one.picture.read_bytes())
    write(tmp_path, [row(word) for word in KNOWN])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "questions.json").write_text(json.dumps(rows))


def traced(*more: str) -> int:
    return main(["trace", "model", "--questions", "questions.json", *more])


def test_trace_writes_all_that_was_found(work: Path, data: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    write(
        work, [*(row(word) for word in KNOWN), row("b", id="wrong", answer="u"), row("c", id="x", constraint="zebra")]
    )
    against = ["--against", "model", "--data", str(data["train"]), "--batches", "2", "--batch_size", "2"]
    assert traced("--tracing.width", "2", *against) == 0
    run = work / "runs/trace-model"
    told = json.loads((run / "causal.json").read_text())
    assert (told["n_questions"], told["n_right"]) == (5, 4)
    assert "zebra" in (run / "ledger.jsonl").read_text()
    maps = json.loads((run / "traces.json").read_text())
    assert {(each["id"], each["site"]) for each in maps} == {(word, s) for word in KNOWN for s in ("mlp", "attention")}
    for each in maps:
        assert len(each["values"]) == len(each["layers"]) == 4
        assert {len(values) for values in each["values"]} == {len(each["tokens"])}
        assert each["window"] == "p2:2"
        assert (run / "pictures" / each["image"]).is_file()
    with (run / "layers.csv").open() as held:
        found = {(each["measure"], each["site"]) for each in csv.DictReader(held)}
    for measure, site in (
        ("trace", "mlp/constraint"),
        ("trace_logit", "attention/last"),
        ("flow", "image->last"),
        ("knockout", "constraint->last/pre"),
        ("ablation", "mean/image"),
        ("transplant", "cumulative/picture"),
        ("transplant", "sliding/picture"),
    ):
        assert (measure, site) in found, (measure, site)
    assert json.loads((run / "pictures.json").read_text())
    page = (run / "report.html").read_text()
    assert "What causes the answer" in page
    assert "mlp/constraint" in capsys.readouterr().out


def test_headlines_name_the_largest_share_and_the_farthest_effect() -> None:
    found = Findings(0)
    found.add("causal", "flow", "image->last", [Estimate(v, n=4, null=0.8) for v in (0.1, 0.6, 0.0)], first=0)
    found.add("causal", "knockout", "image->last/pre", [Estimate(v, n=4, null=0.0) for v in (0.1, -0.1, -0.7)], first=0)
    assert list(strongest_table(found).columns[2].cells) == ["1", "2"]


def test_a_convention_sets_defaults_and_options_stand(work: Path) -> None:
    write(work, [{k: v for k, v in row(word).items() if k != "answer"} for word in KNOWN])
    assert traced("--convention", "p2", "--tracing.width", "2", "--parts", "[trace]", "--name", "p2") == 0
    maps = json.loads((work / "runs/p2/traces.json").read_text())
    assert {each["window"] for each in maps} == {"p2:2"}
    said = "".join(maps[0]["tokens"]).replace(" ", "")
    assert "?Answerinafewwords." in said
    assert traced("--convention", "p2", "--prompt", "{question}", "--parts", "[trace]", "--name", "own") == 0
    maps = json.loads((work / "runs/own/traces.json").read_text())
    assert "Answer" not in "".join(maps[0]["tokens"])


def test_transplants_take_the_windows_that_are_asked_for(work: Path, data: dict[str, Path]) -> None:
    write(work, [row("b")])
    against = ["--against", "model", "--data", str(data["train"]), "--batches", "2", "--batch_size", "2"]
    assert traced("--parts", "[flow]", "--transplant.width", "1", "--transplant.step", "2", *against) == 0
    with (work / "runs/trace-model/layers.csv").open() as held:
        rows = [each for each in csv.DictReader(held) if each["measure"] == "transplant"]
    assert {each["layer"] for each in rows if each["site"] == "sliding/picture"} == {"0", "2"}
    assert {each["layer"] for each in rows if each["site"] == "cumulative/picture"} == {"1", "3"}


@pytest.mark.parametrize("corruption", ["symmetric", "image", "gaussian"])
def test_every_corruption_traces(corruption: str, work: Path) -> None:
    Image.linear_gradient("L").convert("RGB").resize((48, 40)).save(work / "other.png")
    write(work, [row("b"), row("c", image="other.png")])
    assert traced("--corruption", corruption, *LIGHT) == 0
    assert json.loads((work / "runs/trace-model/traces.json").read_text())


def test_without_answers_the_models_own_are_followed(work: Path) -> None:
    write(work, [{k: v for k, v in row(word).items() if k != "answer"} for word in KNOWN])
    assert traced(*LIGHT) == 0
    told = json.loads((work / "runs/trace-model/causal.json").read_text())
    assert (told["n_questions"], told["n_right"]) == (4, 4)


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([], [], "questions.json is empty"),
        ([row("b", constraint="zebra")], [], "None of the 1 rows"),
        ([row("b", answer="u")], [], "answers no question right"),
        ([row("b", image="missing.png")], [], "None of the 1 rows"),
        ([row("b")], ["--parts", "[nonsense]"], "no part 'nonsense'"),
        ([row("b")], ["--corruption", "rust"], "no corruption 'rust'"),
        ([row("b")], ["--prompt", "hello"], "Nothing would be asked"),
        ([row("b")], ["--against", "model"], "nothing to ask the hybrids"),
        ([row("b")], ["--against", "model", "--data", "nowhere.json"], "No data file"),
        ([row("b")], ["--tracing.width", "0"], "nothing to trace with"),
        ([row("b")], ["--knocking.edges", "[moon->last]"], "no edge 'moon->last'"),
    ],
)
def test_mistakes_are_told(
    rows: list[dict[str, Any]], options: list[str], says: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(work, rows)
    assert traced(*options) == 2
    told = capsys.readouterr().err
    assert says in told
    assert "fix:" in told
    assert not (work / "runs").exists(), "a mistake leaves no folder"
