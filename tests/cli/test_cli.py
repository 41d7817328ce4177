"""The command line as a user meets it: real runs on a tiny model, and every mistake on one screen."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from lightning_mm.__main__ import main
from tests.helpers.cli import CONFIGS, ROOT, Fit, run_cli, table
from tests.helpers.data import make_rows


def test_a_run_leaves_everything_in_its_folder(fit: Fit, tmp_path: Path) -> None:
    assert (
        fit(
            "--model.tuning",
            "IntermediateOnly",
            "--model.tuning.layers",
            "1-2",
            "--run.name",
            "mine",
            "--trainer.max_steps",
            "6",
        )
        == 0
    )
    run = tmp_path / "runs" / "mine"
    census = json.loads((run / "census.json").read_text())
    assert census["layers"] == {"expression": "1-2", "trained": [1, 2], "total": 4}
    rows = table(run / "metrics.csv")
    assert [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert [row for row in rows if row.get("val/exact_match")]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["split"] == "test"
    overall = evaluation["rows"][-1]
    assert overall["type"] == "all"
    assert None not in (overall["before"], overall["after"], overall["no_image"], overall["majority"])
    generations = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    assert {"step", "images", "question", "truth", "answer"} == generations[0].keys()
    assert "IntermediateOnly" in (run / "report.html").read_text()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6


def test_the_saved_config_serves_every_verb(fit: Fit, tmp_path: Path) -> None:
    assert fit("--model.tuning", "ConnectorOnly", "--run.name", "first") == 0
    config, checkpoint = str(tmp_path / "runs/first/config.yaml"), str(tmp_path / "runs/first/checkpoints/last.ckpt")
    for verb in ("validate", "test"):
        assert main([verb, "-c", config, "--ckpt_path", checkpoint, "--run.name", verb]) == 0
        rows = table(tmp_path / "runs" / verb / "metrics.csv")
        assert rows[-1][f"{'val' if verb == 'validate' else 'test'}/exact_match"]
    questions = str(tmp_path / "data/test.json")
    assert (
        main(["predict", "-c", config, "--ckpt_path", checkpoint, "--data.predict", questions, "--run.name", "p"]) == 0
    )
    answers = [json.loads(line) for line in (tmp_path / "runs/p/predictions.jsonl").read_text().splitlines()]
    assert {"id", "origin", "turn", "answer", "reference"} == answers[0].keys()
    assert len(answers) == sum(
        len(r["conversations"]) // 2 for r in json.loads((tmp_path / "data/test.json").read_text())
    )


def test_a_name_that_is_taken_gets_a_number(fit: Fit, tmp_path: Path) -> None:
    for _ in range(2):
        assert fit("--run.name", "same", "--evaluation.before", "false", "--evaluation.after", "false") == 0
    assert (tmp_path / "runs/same-2/report.html").is_file()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_tuning_fragment_composes_and_trains(config: Path, fit: Fit, tmp_path: Path) -> None:
    quick = ("--trainer.max_steps", "1", "--evaluation.before", "false", "--evaluation.after", "false")
    assert fit("-c", str(config), *quick, "--run.name", config.stem) == 0
    named = yaml.safe_load(config.read_text())["model"]["tuning"]["class_path"]
    assert json.loads((tmp_path / "runs" / config.stem / "census.json").read_text())["policy"].startswith(named)


@pytest.mark.parametrize("folder", ["model", "data", "trainer", "nano"])
def test_every_other_fragment_parses(folder: str, fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    for config in sorted((ROOT / "configs" / folder).glob("*.yaml")):
        with pytest.raises(SystemExit) as done:
            fit("-c", str(config), "--print_config")
        assert done.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        given = yaml.safe_load(config.read_text())
        for section in given:
            assert section in printed


def test_another_class_on_the_command_line_takes_no_mode_along(fit: Fit, tmp_path: Path) -> None:
    """jsonargparse keeps the options of the class in the file; none of them may turn one policy into another."""
    fragment = str(ROOT / "configs/tuning/intermediate.yaml")
    quick = ("--trainer.max_steps", "1", "--evaluation.before", "false", "--evaluation.after", "false")
    assert fit("-c", fragment, "--model.tuning", "LoRAOnMiddle", *quick, "--run.name", "lora") == 0
    rows = json.loads((tmp_path / "runs/lora/census.json").read_text())["rows"]
    assert {row["mode"] for row in rows} == {"frozen", "lora"}


@pytest.mark.parametrize("key", ["callbacks", "callbacks+", "logger", "logger+", "plugins", "plugins+"])
@pytest.mark.parametrize("named", ["class_path: evil.Callback", "evil.Callback"])
def test_a_foreign_class_in_a_file_is_not_imported(
    key: str, named: str, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path('was-run').touch()\nclass Callback: ...\n")
    (tmp_path / "evil.yaml").write_text(f"trainer:\n  {key}:\n    - {named}\n")
    assert fit("-c", str(tmp_path / "evil.yaml")) == 2
    assert "--allow evil" in capfd.readouterr().err
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "empty"), ("[]", "row"), ("not json", "JSON"), ('[{"id": 1}]', "row")],
)
def test_a_data_file_that_cannot_be_used(content: str, said: str, fit: Fit, tmp_path: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "bad.json").write_text(content)
    assert fit("--data.train", str(tmp_path / "bad.json")) == 2
    error = capfd.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_bad_rows_are_in_the_ledger_and_the_run_goes_on(fit: Fit, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    rows = make_rows(folder, 12)
    (folder / rows[1]["image"]).write_bytes(b"no picture")
    (folder / rows[2]["image"]).unlink()
    whole = folder / rows[3]["image"]
    whole.write_bytes(whole.read_bytes()[:-30])  # the header is right, the pixels end early
    rows[4] = {"id": "no conversation"}
    (folder / "train.json").write_text(json.dumps(rows))
    assert fit("--data.max_bad_fraction", "0.5", "--trainer.max_steps", "6", "--run.name", "bad") == 0
    entries = [json.loads(line) for line in (tmp_path / "runs/bad/ledger.jsonl").read_text().splitlines()]
    assert len({entry["origin"] for entry in entries}) == 4
    assert all(entry["reason"] for entry in entries)


def test_a_resumed_run_continues_the_curves(fit: Fit, tmp_path: Path) -> None:
    assert fit("--run.name", "one", "--trainer.max_steps", "3", "--run.save_every", "3") == 0
    checkpoint = str(tmp_path / "runs/one/checkpoints/last.ckpt")
    assert fit("--run.name", "two", "--trainer.max_steps", "6", "--ckpt_path", checkpoint) == 0
    rows = table(tmp_path / "runs/two/metrics.csv")
    steps = [int(row["step"]) for row in rows if row["train/loss"]]
    assert steps == list(range(6))


def test_resuming_from_any_file_of_a_run_gives_the_same_end(fit: Fit, tmp_path: Path) -> None:
    """With validation, evaluation and accumulation on: what is written between them must not be half a step."""
    options = ["--trainer.accumulate_grad_batches", "2", "--run.save_every", "2", "--model.tuning", "ConnectorOnly"]
    options += ["--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "4"]
    # A schedule that does not depend on the length of the run, so that a short run is the beginning of a long one.
    options += ["--model.optimizer.schedule", "constant", "--model.optimizer.warmup", "0"]
    assert fit(*options, "--trainer.max_steps", "6", "--run.name", "whole") == 0
    assert fit(*options, "--trainer.max_steps", "4", "--run.name", "part") == 0
    expected = torch.load(tmp_path / "runs/whole/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name in ("last", "best"):
        checkpoint = tmp_path / f"runs/part/checkpoints/{name}.ckpt"
        more = ["--trainer.max_steps", "6", "--run.name", f"rest-{name}", "--ckpt_path", str(checkpoint)]
        assert fit(*options, *more) == 0
        resumed = torch.load(tmp_path / f"runs/rest-{name}/checkpoints/last.ckpt", weights_only=True)
        assert resumed["global_step"] == 6
        for parameter, tensor in expected.items():
            assert torch.equal(resumed["state_dict"][parameter], tensor), (name, parameter)


@pytest.mark.parametrize(("policy", "accumulate"), [("ConnectorOnly", 1), ("IntermediateOnly", 2)])
def test_two_ranks_give_the_gradients_of_one(
    policy: str, accumulate: int, arguments: list[str], tmp_path: Path
) -> None:
    """After one AdamW step the first moment is a tenth of the gradient. 1e-6: fp32 sums in another order.

    Rows of uneven length, some without a picture, so that ranks meet batches of different kinds.
    """
    rows = make_rows(tmp_path / "data", 3) + make_rows(tmp_path / "data", 2, seed=9, text_only=True)
    (tmp_path / "data/train.json").write_text(json.dumps(rows))
    quick = ["--evaluation.before", "false", "--evaluation.after", "false", "--trainer.limit_val_batches", "0"]
    moments = []
    for ranks, size in ((1, 4), (2, 2 // accumulate)):
        devices = ["--trainer.devices", str(ranks), "--trainer.strategy", "ddp" if ranks > 1 else "auto"]
        devices += ["--trainer.accumulate_grad_batches", str(accumulate if ranks > 1 else 1)]
        options = [*arguments, *quick, *devices, "--data.batch_size", str(size), "--trainer.max_steps", "1"]
        process = run_cli(["fit", *options, "--model.tuning", policy, "--run.name", f"r{ranks}"], tmp_path)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
        saved = torch.load(tmp_path / f"runs/r{ranks}/checkpoints/last.ckpt", weights_only=True)
        moments.append(saved["optimizer_states"][0]["state"])
        assert len(saved["lightning_mm"]["rng"]) == ranks
    one, two = moments
    assert one.keys() == two.keys()
    for index in one:
        torch.testing.assert_close(two[index]["exp_avg"] * 10, one[index]["exp_avg"] * 10, atol=1e-6, rtol=1e-5)


def test_two_ranks_evaluate_every_question_once(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "data/test.json").write_text(json.dumps(make_rows(tmp_path / "data", 5, seed=7)))
    options = [*arguments, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--run.name", "two"]
    process = run_cli(["fit", *options], tmp_path)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    overall = json.loads((tmp_path / "runs/two/evaluation.json").read_text())["rows"][-1]
    questions = sum(len(row["conversations"]) // 2 for row in json.loads((tmp_path / "data/test.json").read_text()))
    assert overall["n"] == questions


def test_sigterm_saves_at_a_step_and_the_rest_is_the_same(fit: Fit, arguments: list[str], tmp_path: Path) -> None:
    options = ["--trainer.max_steps", "30", "--run.save_every", "1000", "--model.tuning", "ConnectorOnly"]
    quick = ("--evaluation.before", "false", "--evaluation.after", "false")
    assert fit(*options, *quick, "--run.name", "whole") == 0
    killed = run_cli(["fit", *arguments, *options, "--run.name", "killed"], tmp_path)
    metrics = tmp_path / "runs/killed/metrics.csv"
    deadline = time.monotonic() + 100
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGTERM)
    output, _ = killed.communicate(timeout=100)
    checkpoint = tmp_path / "runs/killed/checkpoints/last.ckpt"
    assert killed.returncode == 143, output
    assert 0 < torch.load(checkpoint, weights_only=True)["global_step"] < 30
    rows = json.loads((tmp_path / "runs/killed/evaluation.json").read_text())["rows"]
    assert {row["after"] for row in rows} == {None}, "a run that is stopped is not asked what it has learned"
    assert fit(*options, *quick, "--run.name", "rest", "--ckpt_path", str(checkpoint)) == 0
    expected = torch.load(tmp_path / "runs/whole/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    resumed = torch.load(tmp_path / "runs/rest/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("format_", ["model", "adapter", "merged"])
def test_export_is_proved_in_a_fresh_process(format_: str, fit: Fit, tmp_path: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    quick = ("--evaluation.before", "false", "--evaluation.after", "false")
    assert fit("--model.tuning", "LoRAOnMiddle", "--model.optimizer.lr", "0.05", *quick, "--run.name", "lora") == 0
    assert main(["export", "runs/lora", "--format", format_]) == 0
    assert "largest logit difference" in capfd.readouterr().err
    assert (tmp_path / "runs/lora/export").is_dir()
    assert main(["export", "runs/lora", "--format", format_]) == 2, "the folder is taken"


def test_who_reads_help_may_have_enough() -> None:
    command = [sys.executable, "-m", "lightning_mm", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as asked:
        assert asked.stdout is not None
        assert asked.stderr is not None
        asked.stdout.close()
        assert asked.stderr.read() == b""
    assert asked.returncode == 0


@pytest.mark.parametrize("verb", ["report", "no-such-verb"])
def test_garbage_is_looked_for_after_the_start(verb: str) -> None:
    code = f"import gc; from lightning_mm.__main__ import main; main(['{verb}']); print(gc.isenabled())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False).stdout
    assert output.endswith("True\n")


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from lightning_mm.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "fit" in output
    assert output.endswith("False\n")
