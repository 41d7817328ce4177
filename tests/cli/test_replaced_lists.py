"""A list of callbacks, loggers or plugins that a later file or option replaces is said; shipped files add to theirs."""

from pathlib import Path

import pytest
import yaml

from lightning_mm.__main__ import main
from lightning_mm.cli.replaced_lists import say_replaced
from lightning_mm.cli.shipped_configs import shipped_folder, shipped_names
from lightning_mm.core.decisions import DecisionLog

LISTS = ("callbacks", "logger", "plugins")
PROBING = "{trainer: {callbacks: [{class_path: lightning_mm.ProbingCallback}, DriftCallback]}}"
SHIPPED = ("callbacks/inside.yaml", "callbacks/causal.yaml")


def said(*arguments: str) -> list[str]:
    with DecisionLog().opened() as log:
        say_replaced(["fit", *arguments])
        return [str(decision) for decision in log]


@pytest.mark.parametrize(
    ("later", "lost"),
    [
        (["--trainer.callbacks", "EarlyStopping"], "without ProbingCallback, DriftCallback (--trainer.callbacks "),
        (["--trainer.callbacks=[DriftCallback]"], "without ProbingCallback (--trainer.callbacks "),
        (["--trainer.callbacks=null"], "without ProbingCallback, DriftCallback"),
        (["-c", "{trainer: {callbacks: EarlyStopping}}"], "without ProbingCallback, DriftCallback"),
        (["--config={trainer: {callbacks: []}}"], "without ProbingCallback, DriftCallback"),
        (["--trainer.callbacks", "ProbingCallback"], "without ProbingCallback, DriftCallback"),
    ],
)
def test_what_a_later_list_drops(later: list[str], lost: str) -> None:
    (line,) = said("-c", PROBING, *later)
    assert line.startswith("trainer.callbacks: ")
    assert lost in line
    assert "callbacks+ in its place adds to it" in line


@pytest.mark.parametrize(
    "later",
    [
        ["--trainer.callbacks+", "EarlyStopping"],
        ["--trainer.callbacks+=EarlyStopping"],
        ["-c", "{trainer: {callbacks+: [EarlyStopping]}}"],
        ["-c", PROBING],
        ["-c", "{trainer: {max_steps: 3}, model: {tuning: Full}}"],
        ["--trainer.callbacks.patience", "3"],
    ],
)
def test_what_drops_nothing(later: list[str]) -> None:
    assert said("-c", PROBING, *later) == []


def test_loggers_and_plugins_too() -> None:
    assert len(said("--trainer.logger", "CSVLogger", "--trainer.logger", "false")) == 1
    assert len(said("-c", "{trainer: {plugins: [TorchCheckpointIO]}}", "--trainer.plugins=[]")) == 1


def test_shipped_files_add_to_the_lists_before_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in shipped_names():
        trainer = (yaml.safe_load((shipped_folder() / name).read_text()) or {}).get("trainer") or {}
        assert not trainer.keys() & set(LISTS), f"{name} replaces a list"
    (tmp_path / "own.yaml").write_text("trainer: {callbacks: [LearningRateMonitor]}")
    files = [part for name in (str(tmp_path / "own.yaml"), *SHIPPED) for part in ("-c", name)]
    with pytest.raises(SystemExit):
        main(["fit", *files, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    kinds = [each["class_path"].rpartition(".")[2] for each in printed]
    assert kinds == ["LearningRateMonitor", "ProbingCallback", "GeometryCallback", "DriftCallback", "CausalCallback"]
