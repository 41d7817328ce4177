"""Looking inside from the command line: two lines of YAML in a fit, several ranks, and inspect without training."""

import json
from pathlib import Path

import pytest
import torch

from lightning_mm.__main__ import main
from lightning_mm.analysis import hidden_states as readings
from tests.helpers.cli import QUICK, Fit, inspect, run_cli
from tests.helpers.data import Family, make_probe_rows
from tests.helpers.inspection import rows_of

LOOK = "{class_path: %s, init_args: {schedule: {every: 2, budget: null}}}"
CALLBACKS = ("--trainer.callbacks", "[" + ", ".join(LOOK % n for n in ("GeometryCallback", "ProbingCallback")) + "]")


def test_two_lines_of_yaml_look_inside(fit: Fit, tmp_path: Path, probes: Path) -> None:
    (tmp_path / "inside.yaml").write_text("trainer:\n  callbacks:\n    - ProbingCallback\n    - GeometryCallback\n")
    assert fit("-c", "inside.yaml", *QUICK, "--data.probes", str(probes), "--run.name", "inside") == 0
    run = tmp_path / "runs/inside"
    found = rows_of(run)
    assert {row.step for row in found} >= {0, 4}
    assert {row.analysis for row in found} == {"probing", "geometry"}
    assert {row.layer for row in found} == {-1, 0, 1, 2, 3}
    metrics = (run / "metrics.csv").read_text()
    assert "inspect/seconds" in metrics
    assert "inside/overlap/image~text/peak_layer" in metrics
    report = (run / "report.html").read_text()
    assert "Inside the model" in report
    assert "<script src" not in report
    told = json.loads((run / "probes.json").read_text())
    assert told["images"] == 24


@pytest.mark.parametrize("ranks", [3])
def test_ranks_find_the_same(ranks: int, arguments: list[str], tmp_path: Path, probes: Path) -> None:
    """Every digit: whole batches are dealt out, and rank 0 analyses what all have read."""
    found = []
    for count in (1, ranks):
        devices = ["--trainer.devices", str(count), "--trainer.strategy", "ddp" if count > 1 else "auto"]
        more = [*QUICK, *CALLBACKS, "--data.probes", str(probes), "--data.eval_batch_size", "7"]
        more += ["--model.optimizer.lr", "1e-12", "--trainer.max_steps", "1"]
        process = run_cli(["fit", *arguments, *devices, *more, "--run.name", f"r{count}"], tmp_path)
        output, _ = process.communicate(timeout=250)
        assert process.returncode == 0, output
        found.append([row for row in rows_of(tmp_path / f"runs/r{count}") if row.step == 0])
    assert found[0]
    assert found[0] == found[1]


def test_a_row_that_comes_twice_counts_once(probes: Path) -> None:
    """As where a sampler pads ranks to equal length."""
    from lightning_mm.data.datamodule import MMDataModule

    data = MMDataModule(probes=str(probes), processor="none")
    rows = data.probe_set().rows
    some = [row for row in rows if row.role == "picture"][:4]
    features = torch.arange(2 * 6 * 3.0).reshape(2, 6, 3)
    order = [2, 0, 1, 2, 3, 0]
    addresses = tuple((some[i].id, 0) for i in order)
    reading = readings.HiddenStates(0, {"picture/last": features}, {"picture/last": addresses})
    kept = readings.gather_hidden_states(reading, data.probe_set())
    assert kept is not None
    assert kept.sample_index["picture/last"] == tuple((row.id, 0) for row in some)
    assert torch.equal(kept.features["picture/last"], features[:, [1, 2, 0, 4]])


def test_inspect_measures_what_the_third_paper_does(family: Family, probes: Path, tmp_path: Path) -> None:
    """Every option that the protocol of 2606.03871 needs, on one model."""
    measures = "[overlap_matrix,entropy_unit_rows,svcca,distance_correlation,cka_biased,token_cosine]"
    more = ("--probes", str(probes), "--measures", measures, "--neighbours", "30", "--svcca_variance", "0.5")
    assert inspect(tmp_path, str(family("llava")), *more, "--both_last", "true", "--select", "false") == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert {(row.measure, row.site) for row in rows_of(run)} >= {
        ("entropy_unit_rows", "picture"),
        ("svcca", "last"),
        ("distance_correlation", "last"),
        ("cka_biased", "image~text"),
        ("token_cosine", "token_last"),
    }
    matrices = json.loads((run / "matrices.json").read_text())
    assert ("overlap", "last") in {(each["measure"], each["site"]) for each in matrices}
    assert "Shared neighbours" in (run / "report.html").read_text()


def test_inspect_reads_a_model_folder(
    family: Family, data: dict[str, Path], probes: Path, tmp_path: Path, capsys
) -> None:  # type: ignore[no-untyped-def]
    more = (
        "--probes",
        str(probes),
        "--data",
        str(data["train"]),
        "--measures",
        "[all]",
        "--probing.selectivity",
        "true",
    )
    assert inspect(tmp_path, str(family("llava")), *more) == 0
    run = tmp_path / "runs/inspect-llava"
    found = rows_of(run)
    assert {"overlap", "cka", "svcca", "id_twonn", "objects", "entailment/hard/text_only"} <= {r.measure for r in found}
    for row in found:
        assert (row.value is None) == bool(row.undefined), row
        if row.layer == -1 and row.site in ("last", "picture", "text") and row.analysis == "geometry":
            assert row.value is None, row  # the last prompt token's embedding is the same for every row
    selection = json.loads((run / "selection.json").read_text())
    assert set(selection["criteria"]) >= {"overlap", "entailment", "dimension", "influence", "rgn", "snr", "fisher"}
    assert not selection["evidence"]
    assert (run / "report.html").is_file()
    assert "peak" in capsys.readouterr().out


def test_inspect_compares_a_checkpoint_with_its_base(
    fit: Fit, family: Family, data: dict[str, Path], probes: Path, tmp_path: Path
) -> None:
    policy = ("--model.tuning", "IntermediateOnly", "--model.tuning.layers", "2", "--model.optimizer.lr", "0.05")
    assert fit(*QUICK, *policy, "--data.probes", str(probes), "--run.name", "tuned") == 0
    more = ("--against", "runs/tuned", "--probes", str(probes), "--data", str(data["train"]), "--text_only", "false")
    assert inspect(tmp_path, str(family("llava")), *more) == 0
    run = next((tmp_path / "runs").glob("inspect-llava-tuned"))
    drifted = {row.layer: row.value for row in rows_of(run) if (row.measure, row.site) == ("drift_cosine", "image")}
    assert [drifted[layer] == 1 for layer in (-1, 0, 1, 2, 3)] == [True, True, True, False, False]
    selection = json.loads((run / "selection.json").read_text())
    drift = selection["criteria"]["drift"]
    assert drift[:2] == [0, 0]
    transplant = selection["criteria"]["transplant"]
    assert max(range(4), key=lambda layer: transplant[layer]) in (1, 2, 3)
    assert json.loads((run / "inspection.json").read_text())["labels"]["1"] == "runs/tuned"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((), "There is nothing to probe with."),
        (("--probes", "nowhere.json"), "No file nowhere.json"),
        (("--probes", "empty.json"), "empty.json"),
        (("--measures", "[ckaa]", "--probes", "empty.json"), "There is no geometric measure 'ckaa'"),
        (("--prob", "x"), "is no option"),
        (("--auto.criteria", "[overlapp]"), "There is no criterion"),
    ],
)
def test_mistakes_are_told_on_one_screen(
    more: tuple[str, ...], told: str, family: Family, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    Path("empty.json").write_text("[]")
    assert inspect(tmp_path, str(family("llava")), *more) == 2
    assert told in capsys.readouterr().err


def test_auto_in_a_fit_is_saved_resumed_and_exported(fit: Fit, tmp_path: Path) -> None:
    probes = make_probe_rows(tmp_path / "p", 24)
    auto = ("--model.tuning", "IntermediateOnly", "--model.tuning.layers", "auto:2", "--model.auto.resamples", "4")
    more = (*QUICK, *auto, "--data.probes", str(probes))
    assert fit(*more, "--run.name", "auto", "--trainer.max_steps", "2") == 0
    run = tmp_path / "runs/auto"
    chosen = json.loads((run / "selection.json").read_text())["layers"]
    assert json.loads((run / "census.json").read_text())["layers"]["trained"] == chosen
    checkpoint = str(run / "checkpoints/last.ckpt")
    assert fit(*more, "--run.name", "on", "--trainer.max_steps", "3", "--ckpt_path", checkpoint) == 0
    assert json.loads((tmp_path / "runs/on/selection.json").read_text())["layers"] == chosen
    assert main(["export", str(run)]) == 0
