"""Console output: plain lines where it is piped, and messages above a running bar where it is a terminal."""

import io
import logging
import re
import sys

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tqdm import tqdm

from lightning_mm.core import console
from lightning_mm.core.console import ConsoleHandler, PlainConsole
from tests.helpers.terminal import redrawn

LONG = "a decision with a reason that goes on and on " * 6


@pytest.fixture
def logger() -> logging.Logger:
    made = logging.Logger("shown")
    made.addHandler(ConsoleHandler())
    return made


def test_piped_messages_are_whole_lines(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("%s [bold]as it is[/bold] 0.5", LONG)
    assert capsys.readouterr().err == f"{LONG} [bold]as it is[/bold] 0.5\n"


def test_piped_tables_are_lines_without_rules_and_padding() -> None:
    table = Table("policy", "reason", title="A title that is longer than the table", caption="said below")
    table.min_width = len(LONG) + 99
    table.add_row("Full", LONG)
    table.add_row("ConnectorOnly", "short")
    file = io.StringIO()
    PlainConsole(file=file).print(table)
    lines = file.getvalue().splitlines()
    assert lines[0] == "A title that is longer than the table"
    assert lines[2] == f"Full           {LONG.rstrip()}"
    assert lines[3] == "ConnectorOnly  short"
    assert lines[4] == "said below"
    assert not re.search(r"[─│┃━\x1b]| $", file.getvalue(), re.M)


@pytest.mark.parametrize("width", [80, 140])
def test_messages_go_above_a_bar(width: int, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redrawn by a terminal, every message and one bar are left, each on lines of its own."""
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    shared = PlainConsole(stderr=True, width=width, force_terminal=True)
    monkeypatch.setattr(console, "message_console", lambda: shared)
    with Progress(console=shared, auto_refresh=False) as bar:
        task = bar.add_task("training", total=3)
        for step in range(3):
            logger.info("step %d: %s", step, LONG)
            bar.advance(task)
            bar.refresh()
    shown = redrawn(screen.getvalue())
    assert sum(line.startswith("training") for line in shown) == 1
    told = [line for line in shown if not line.startswith("training")]
    assert "".join(told).replace(" ", "") == "".join(f"step{n}:{LONG}" for n in range(3)).replace(" ", "")
    assert max(map(len, shown)) <= width


def test_messages_go_above_the_bar_of_another(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress(console=Console(file=screen, force_terminal=True, width=80), auto_refresh=False) as bar:
        bar.add_task("theirs", total=3)
        bar.refresh()
        logger.info("ours")
    shown = redrawn(screen.getvalue())
    assert [line.split()[0] for line in shown] == ["ours", "theirs"]


def test_messages_go_above_a_bar_of_tqdm(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of transformers' Trainer: no message begins at the end of the bar."""
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    with tqdm(total=3, desc="training", file=screen) as bar:
        for step in range(3):
            logger.info("step %d: %s", step, LONG)
            bar.update()
    shown = [line.rpartition("\r")[2] for line in screen.getvalue().split("\n")]
    assert [line for line in shown if line.startswith("step")] == [f"step {step}: {LONG}" for step in range(3)]
