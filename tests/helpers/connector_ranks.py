"""Ranks that begin a fit with a scaled connector: ``python -m tests.helpers.connector_ranks OUT MODEL TRAIN``.

Data flow: ``launch`` starts a process per rank, each with a sentence of its own -> ``OUT/<rank>.txt``: what it decided.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_mm.core.decisions import DecisionLog
from lightning_mm.execution import connector_init
from lightning_mm.tuning import ConnectorOnly
from tests.helpers.ranks import launch_ranks
from tests.helpers.training import train

SENTENCES = (connector_init._SENTENCE, "Nine, eight, seven")


def launch(model: Path, rows: Path, out: Path) -> list[str]:
    """What each of two ranks decided."""
    launch_ranks("tests.helpers.connector_ranks", [out, model, rows])
    return [(out / f"{rank}.txt").read_text() for rank in range(2)]


def factor_of(model: Path, rows: Path, out: Path, rank: int, **options: Any) -> str:
    """What a fit decides that measures the words of a rank's sentence."""
    with pytest.MonkeyPatch.context() as patch, DecisionLog().opened() as decided:
        patch.setattr(connector_init, "_SENTENCE", SENTENCES[rank])
        tuning = ConnectorOnly()
        train(model, {"train": rows}, out, tuning=tuning, connector_init="stream_norm", max_steps=1, **options)
    return next(each.value for each in decided if each.name == "model.connector_init")


def main() -> None:
    """One rank."""
    out, model, rows = map(Path, sys.argv[1:])
    rank = int(os.environ["RANK"])
    (out / f"{rank}.txt").write_text(factor_of(model, rows, out, rank, devices=2, strategy="ddp"))


if __name__ == "__main__":
    main()
