"""What a fit shows: in a terminal a bar below whole messages, at 80 and 140 columns; piped, a line per message."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_mm.core import console
from tests.helpers.data import Data, Family
from tests.helpers.fits import Fits, Fitted, short_fits
from tests.helpers.terminal import redrawn


@pytest.fixture
def fits(
    family: Family, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Fits]:
    console.message_console.cache_clear()
    yield short_fits(family("llava"), data, tmp_path, capfd, monkeypatch)
    console.message_console.cache_clear()


def decided(fit: Fitted) -> list[str]:
    """The lines of all decisions."""
    return fit.decisions.splitlines()


@pytest.mark.parametrize("width", [80, 140])
def test_a_terminal_shows_whole_messages_above_one_bar(width: int, fits: Fits, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    fit = fits("--trainer.max_steps=4", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2")
    shown = redrawn(screen.getvalue())
    assert fit.status == 0
    assert max(map(len, shown)) <= width
    assert [line.split()[2] for line in shown if line.startswith("training")] == ["4/4"]
    text = "".join(shown).replace(" ", "")
    assert [line for line in decided(fit) if line.replace(" ", "") not in text] == []


def test_a_pipe_gets_plain_lines(fits: Fits) -> None:
    fit = fits("--trainer.max_steps=4", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2")
    lines = fit.output.splitlines()
    assert fit.status == 0
    assert [line for line in decided(fit) if line not in lines] == []
    assert sum(line.startswith("step ") for line in lines) == 4
    assert all(line.isprintable() and line == line.rstrip() for line in lines if line)
    assert max(map(len, lines)) > 80
