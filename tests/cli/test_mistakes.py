"""Mistyped commands: one screen that says what, why and how to mend it, exit status 2, and no folder of a run."""

import re
from pathlib import Path

import pytest

from lightning_mm.__main__ import main
from tests.helpers.cli import Fit

VERBS = [
    ("train", "Did you mean fit?"),
    ("fitt", "Did you mean fit?"),
    ("eval", "Did you mean validate?"),
    ("chat", "Did you mean predict?"),
    ("probe", "Did you mean inspect?"),
    ("--versionn", "no verb"),
    ("fit", "--model.backbone.path is missing."),
    ("fit --data.train data/train.json", "--model.backbone.path is missing."),
    ("fit --print_confg", "Did you mean --print_config?"),
    ("export", "RUN is missing."),
    ("export runs/none", "There is no run directory"),
    ("export runs/none --format gguf", "Choices are model, adapter, merged."),
    ("replay", "FILE is missing."),
    ("replay runs/none/nonfinite/step-3.json", "There is no"),
    ("report nowhere", "There is no run directory"),
    ("inspect", "MODEL is missing."),
    ("inspect model --measure cka", "Did you mean --measures?"),
    ("trace model", "--questions is missing."),
    ("edit model", "--edits is missing."),
    ("plan --model.backbone.path model --trainer.max_step 3", "Did you mean --trainer.max_steps?"),
]
"""A whole command line, and what is said."""
OPTIONS = [
    ("--model.tunning Full", "Did you mean --model.tuning?"),
    ("--trainer.max_step 3", "Did you mean --trainer.max_steps?"),
    ("-trainer.max_steps 3", "Did you mean --trainer.max_steps?"),
    ("--trainer.max_steps", "--trainer.max_steps has no value."),
    ("--trainer.max_steps many", "Expected a int. Got value: many"),
    ("--trainer.enable_checkpointing maybe", "Expected bool. Given value: maybe"),
    ("--seed_everything abc", "Expected bool or int."),
    ("--model.tuning Midle", "tuning policy"),
    ("--model.tuning.layers 6-8", "Add --model.tuning IntermediateOnly"),
    ("--model.tuning IntermediateOly", "Did you mean IntermediateOnly?"),
    ("--model.tuning lightning_mm.tuning.Fulll", "Did you mean Full?"),
    ("--model.tuning nopackage.Full", "The package nopackage is not installed."),
    ("--model.tuning Full --model.tuning.vison full", "Did you mean vision?"),
    ("--model.tuning Full --model.tuning.vision ful", "Did you mean full?"),
    ("--model.tuning IntermediateOnly --model.tuning.layers 3-9", "0 to 3"),
    ("--model.optimizer.lr fast", "model.optimizer.lr"),
    ("--model.optimizer.lr -1", "model.optimizer.lr: -1"),
    ("--model.backbone.path nowhere/at/all", "There is no nowhere/at either."),
    ("--model.backbone.path data/../modell", "there is no folder data/../modell."),
    ("--model.backbone.path datta", "Did you mean data?"),
    ("--trainer.callbacks EarlyStoping", "Did you mean EarlyStopping?"),
    ("--trainer.callbacks lightning.pytorch.callbacks.EarlyStoping", "Did you mean EarlyStopping?"),
    ("--trainer.callbacks EarlyStopping", "--trainer.callbacks.monitor is missing."),
    ("--trainer.callbacks EarlyStopping --trainer.callbacks.monitr x", "Did you mean monitor?"),
    ("--trainer.plugins TorchCheckpointIo", "Did you mean TorchCheckpointIO?"),
    ("--data.train nowhere.json", "No data file nowhere.json"),
    ("--data.train texts", "texts holds no file of rows."),
    ("--data.batch_size 0", "data.batch_size is 0."),
    ("--run.name a/b", "cannot name a run"),
    ("--run.wandb onlin", "Did you mean online?"),
    ("--run.save_every 0", "run.save_every is 0."),
    ("--evaluation.max_questions -1", "evaluation.max_questions is -1."),
    ("--ckpt_path nowhere.ckpt", "There is no checkpoint nowhere.ckpt"),
    ("--ckpt_path lst", "Did you mean last?"),
    ("--ckpt_path best", "There is no run of that name"),
    ("-c nowhere.yaml", "There is no file nowhere.yaml."),
    ("-c min.yaml", "Did you mean mine.yaml?"),
    ("mine.yaml", "Files are named by -c mine.yaml."),
    ("-c section.yaml", "Did you mean --trainer.max_steps?"),
    ("-c option.yaml", "Did you mean --trainer.max_steps?"),
    ("-c class.yaml", "Did you mean EarlyStopping?"),
    ("-c syntax.yaml", "line 3, column 2"),
    ("-c list.yaml", "list.yaml sets no options."),
    ("-c empty.yaml", "It is empty."),
    ("-c binary.yaml", "binary.yaml cannot be read."),
]
"""Options beside those of a fit that would run, and what is said."""
FILES = {
    "mine.yaml": b"trainer: {max_steps: 3}",
    "section.yaml": b"trainr: {max_steps: 3}",
    "option.yaml": b"trainer: {max_step: 3}",
    "class.yaml": b"trainer:\n  callbacks:\n    - class_path: EarlyStoping\n",
    "syntax.yaml": b"trainer:\n  max_steps: 3\n max_epochs: : 2\n",
    "list.yaml": b"- trainer\n- model\n",
    "empty.yaml": b"",
    "binary.yaml": b"\xff\xfe\x00\x01",
}


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("No row.")


def check(status: int, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    written = capfd.readouterr()
    message = written.err[written.err.index("error: ") :]
    assert status == 2
    assert said in message
    assert "Traceback" not in written.err + written.out
    assert len(message.splitlines()) <= 12
    assert {"why:", "fix:"} <= set(re.findall(r"\b(?:why|fix):", message))
    assert not list(Path("runs").glob("*"))


@pytest.mark.parametrize(("command", "said"), VERBS)
def test_a_command(command: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    check(main(command.split()), said, capfd)


@pytest.mark.parametrize(("options", "said"), OPTIONS)
def test_an_option_of_fit(options: str, said: str, fit: Fit, capfd: pytest.CaptureFixture[str]) -> None:
    check(fit(*options.split()), said, capfd)


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_a_split_that_is_not_given(verb: str, fit: Fit, capfd: pytest.CaptureFixture[str]) -> None:
    check(fit("--data.test=null", verb=verb), f"data.{verb} is not set.\n  why: {verb} needs it.", capfd)
