"""lightning-mm edit: from a file of edits to tables, numbers, a report and an exported model; mistakes told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.__main__ import main
from lightning_mm.causal.editing.files import read_edits
from lightning_mm.causal.editing.metrics import EditScorer, edit_measures, loss_change
from lightning_mm.causal.editing.multedit import EditConfig, ValueOptimizer, multedit
from lightning_mm.causal.editing.weight_edit import apply_edits
from lightning_mm.core.errors import UserError
from lightning_mm.models.export.export import export_full
from lightning_mm.models.export.model_card import Provenance
from lightning_mm.models.loading import Backbone, load_model
from tests.helpers.taught_models import EDITED, Taught


def row(word: str, **more: Any) -> dict[str, Any]:
    return {"id": word, "question": f"Which is {word} thing?", "image": "picture.png", "constraint": word, **more}


ROWS = [
    row("d", answer="i", new_answer="e", paraphrases=["Which is the d thing?"], other_images=["other.png"])
    | {"neighbours": [{"question": "Which is b thing?", "image": "picture.png"}, {"question": "Which is c thing?"}]},
    row("f", new_answer="i", group="f"),
    row("d", id="lost", new_answer="e", constraint="zebra"),
    row("b", id="stays"),
]


@pytest.fixture
def work(known: Callable[[str], Taught], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model that knows something, and edits of it."""
    one = known("llava")
    export_full(one.model, one.encoder.processor, tmp_path / "model", Provenance("tiny"))
    for name in ("picture.png", "other.png"):
        (tmp_path / name).write_bytes(one.picture.read_bytes())
    (tmp_path / "edits.json").write_text(json.dumps(ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_edit_measures_and_exports(
    work: Path, known: Callable[[str], Taught], data: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--steps", "60", "--data", str(data["val"]), "--out", "edited"]
    assert main(["edit", "model", "--edits", "edits.json", *more]) == 0
    run = work / "runs/edit-model"
    told = json.loads((run / "edits.json").read_text())
    assert told["layer"] == EDITED, "where the words are told apart"
    assert [each["layer"] for each in told["layers"]] == [0, 1, 2]
    ways = [(outcome["method"], outcome["apply"]) for outcome in told["outcomes"]]
    assert len(ways) == 6
    assert ways[0] == ("MultEdit", "each")
    for outcome in told["outcomes"]:
        if outcome["method"] == "MultEdit":
            found = outcome["measures"]
            assert (found["efficacy"]["value"], found["efficacy"]["null"], found["efficacy"]["n"]) == (1, 0, 2)
            assert found["rewrite_acc"]["value"] == 1
            assert found["specificity, neighbours"]["n"] == 2
            assert found["specificity, unrelated"]["n"] == 2, "the row without a new answer, after each edit"
            assert found["locality"]["n"] == 1, "questions in text only"
            assert found["generalisation, other pictures"]["n"] == found["generalisation, other words"]["n"] == 1
            assert found["loss per token, general task"]["value"] is not None
    causal = json.loads((run / "causal.json").read_text())
    assert (causal["n_questions"], causal["n_right"]) == (2, 1), "one has an answer, and that is right"
    assert [table["title"] for table in causal["tables"]] == [
        "Each edit alone",
        "All edits at once",
        "Answers",
        "By layer",
    ]
    assert all(len(line) == len(table["columns"]) for table in causal["tables"] for line in table["rows"])
    assert "constraint not in the question" in (run / "ledger.jsonl").read_text()
    assert (run / "report.html").is_file()
    assert "All edits at once" in capsys.readouterr().out
    one = known("llava")
    targets = [one.forced("d", "e"), one.forced("f", "i")]
    edit = multedit([ValueOptimizer(one.mm, target) for target in targets], EDITED, EditConfig(steps=60))
    exported = load_model(Backbone(path=str(work / "edited")))
    with apply_edits(one.model, [edit]), torch.no_grad():
        live = one.model(**targets[0].encoded.inputs).logits
    torch.testing.assert_close(exported(**targets[0].encoded.inputs).logits, live)
    assert not torch.allclose(one.model(**targets[0].encoded.inputs).logits, live, atol=1e-2)


def test_a_layer_that_is_named_is_taken(work: Path) -> None:
    more = ["--layer", "0", "--control", "false", "--apply", "each", "--clamp", "p2", "--steps", "2", "--name", "zero"]
    assert main(["edit", "model", "--edits", "edits.json", *more]) == 0
    told = json.loads((work / "runs/zero/edits.json").read_text())
    assert (told["layer"], told["layers"], len(told["outcomes"])) == (0, [], 1)
    assert told["edits"][0]["delta"] <= 1.001e-4 * told["edits"][0]["value"]
    assert told["outcomes"][0]["measures"]["efficacy"]["value"] == 0


def test_a_convention_is_that_of_the_released_code(work: Path) -> None:
    more = ["--convention", "p2", "--control", "false", "--name", "p2"]
    assert main(["edit", "model", "--edits", "edits.json", *more]) == 0
    told = json.loads((work / "runs/p2/edits.json").read_text())
    assert (told["layer"], len(told["outcomes"])) == (2, 1)
    released = {"steps": 10, "lr": 0.1, "decay": 0.001, "clamp": "p2", "ridge": 0.01, "target": "first", "until": 0.0}
    released |= {"place": "first"}
    assert told["options"] == released
    assert told["edits"][0]["delta"] <= 1.001e-4 * told["edits"][0]["value"]
    assert (
        main(["edit", "model", "--edits", "edits.json", *more[:4], "--layer", "0", "--clamp", "4", "--name", "n"]) == 0
    )
    told = json.loads((work / "runs/n/edits.json").read_text())
    assert (told["layer"], told["options"]) == (0, released | {"clamp": 4.0})


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--edits", "nowhere.json"), "No file of edits nowhere.json"),
        (("--edits", "none.json"), "holds no edit that can be made"),
        (("--edits", "edits.json", "--layer", "3"), "Layer 3 cannot be edited"),
        (("--edits", "edits.json", "--clamp", "0"), "edit.clamp: 0.0 is out of range"),
        (("--edits", "edits.json", "--out", "model"), "model is taken"),
        (("--edits", "edits.json", "--data", "nowhere.json"), "No data file nowhere.json"),
        (("--edits", "edits.json", "--limit", "0"), "limit is 0"),
        (("--edits", "edits.json", "--layers", "1"), "--layers is no option"),
    ],
)
def test_mistakes_are_told_on_one_screen(
    more: tuple[str, ...], told: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "none.json").write_text(json.dumps([{"question": "What?"}, row("b", new_answer="e", constraint="q"), 3]))
    assert main(["edit", "model", *more]) == 2
    assert told in capsys.readouterr().err
    if "--layer" not in more:
        assert not (work / "runs").exists(), "nothing is made where nothing can be done"


def test_rows_are_read_or_told(work: Path) -> None:
    bad = {
        "not text": row("b", new_answer=7),
        "not a list": row("b", new_answer="e", paraphrases="Which?"),
        "no constraint": row("b", new_answer="e", constraint=None),
        "missing image": row("b", new_answer="e", other_images=["nowhere.png"]),
        "outside": row("b", new_answer="e", other_images=["../edits.json"]),
    }
    (work / "rows.json").write_text(json.dumps([*ROWS, *bad.values()]))
    file = read_edits(work / "rows.json")
    assert [each.question.id for each in file.requests] == ["d", "f"]
    assert [each.id for each in file.locality] == ["stays"]
    first = file.requests[0]
    assert first.question.text[slice(*first.question.spans[0])] == "d"
    assert [len(each.images) for each in first.neighbors] == [1, 0]
    assert first.other_images == ((work / "other.png",),)
    assert len(file.rejections) == 1 + len(bad)
    for what, rejection in zip(bad, file.rejections[1:], strict=True):
        assert what in rejection.reason, rejection
    (work / "rows.json").write_text("[3]")
    with pytest.raises(UserError, match="holds no edit"):
        read_edits(work / "rows.json")


def test_scores_of_an_untouched_model_say_so(work: Path, known: Callable[[str], Taught]) -> None:
    """Nothing edited: no new answer, all answers kept, no divergence."""
    one = known("llava")
    scorer = EditScorer(one.mm, one.encoder, torch.device("cpu"))
    file = read_edits("edits.json")
    probes = scorer.probes(file.requests[0], file.locality)
    assert [probe.kind for probe in probes] == [
        "edited",
        "paraphrase",
        "picture",
        "neighbour",
        "neighbour",
        "unrelated",
    ]
    assert probes[0].old.answer.startswith("i")
    found = edit_measures(scorer.measure(probes))
    assert found["efficacy"].value == found["efficacy, p(new) > p(old)"].value == 0
    assert found["specificity, neighbours"].value == found["multimodal_locality"].value == 1
    assert found["KL of the first token, neighbours"].value == pytest.approx(0, abs=1e-6)


def test_the_general_loss_is_per_token() -> None:
    before = torch.tensor([[10.0, 5.0], [2.0, 1.0], [3.0, 6.0], [4.0, 4.0]])
    after = before + torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    loss, rise = loss_change(before, after, ["a", "b", "c", "d"])
    assert (loss.value, loss.null) == (pytest.approx(21 / 16), pytest.approx(19 / 16))
    assert rise.value == pytest.approx(2 / 16)
    assert rise.low is not None
    assert rise.low < 2 / 16 < rise.high  # type: ignore[operator]
    assert loss_change(before[:0], after[:0], [])[0].value is None
