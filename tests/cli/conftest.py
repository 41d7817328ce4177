"""Fixtures of the command line's tests: options of a short fit, and the fit itself."""

from pathlib import Path

import pytest

from lightning_mm.__main__ import main
from tests.helpers.cli import Fit
from tests.helpers.data import Family
from tests.helpers.taught_models import known

__all__ = ["known"]


@pytest.fixture
def arguments(family: Family, data: dict[str, Path]) -> list[str]:
    """Options of four steps on the CPU with a tiny LLaVA."""
    return [
        *("--model.backbone.path", str(family("llava"))),
        *(part for split, path in data.items() for part in (f"--data.{split}", str(path))),
        *("--data.num_workers", "0", "--data.batch_size", "2", "--model.max_new_tokens", "3"),
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", "4", "--trainer.log_every_n_steps", "1"),
        *("--run.wandb", "off"),
    ]


@pytest.fixture
def fit(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Run a verb (``fit``) in this process, with run directories under ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_MM_RUN", raising=False)
    return lambda *more, verb="fit": main([verb, *arguments, *more])
