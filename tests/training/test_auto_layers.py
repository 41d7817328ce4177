"""``layers: auto`` at the start of a fit, where something fails: all ranks hear of it, and what can be had is used."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.core import distributed
from lightning_mm.core.decisions import decision_log
from lightning_mm.core.distributed import run_on_all_ranks
from lightning_mm.core.errors import UserError
from lightning_mm.layer_selection import gradient_criteria
from lightning_mm.layer_selection.select import AutoRange
from lightning_mm.training import auto_layers
from lightning_mm.tuning import IntermediateOnly
from tests.helpers.data import Data, Family
from tests.helpers.training import train


def test_what_one_rank_fails_with_is_known_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest rank that failed is heard, and none keeps what it has made."""

    def broken() -> int:
        raise RuntimeError("here")

    for there, attempt, expected in (
        ("", lambda: 7, (7, "")),
        ("", broken, (None, "RuntimeError: here")),
        ("OSError: there", lambda: 7, (None, "OSError: there")),
        ("OSError: there", broken, (None, "RuntimeError: here")),
    ):
        monkeypatch.setattr(distributed, "all_gather_object", lambda mine, there=there: [mine, there])
        assert run_on_all_ranks(attempt) == expected


@pytest.mark.parametrize("error", [RuntimeError("cut off"), UserError("Rows are cut off.", "why", "fix")])
def test_auto_fails_on_all_ranks_alike(
    error: Exception, family: Family, probed: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise error

    told: list[Any] = []
    monkeypatch.setattr(auto_layers, "extract_hidden_states", broken)
    for module in (distributed, auto_layers):
        monkeypatch.setattr(module, "all_gather_object", lambda mine: [told.append(mine) or mine])
    with pytest.raises(UserError, match="cut off") as caught:
        train(family("llava"), probed, tmp_path, tuning=IntermediateOnly(layers="auto"), max_steps=1)
    assert told[-1], "the other ranks were told"
    assert caught.value.what in ("Rows are cut off.", "Layers cannot be chosen (layers: auto).")


def test_auto_goes_on_without_gradients(
    family: Family, probed: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    decision_log().clear()
    monkeypatch.setattr(gradient_criteria, "gradient_scores", full)
    options = AutoRange(resamples=2, batches=2, criteria=("influence", "rgn"))
    module, _ = train(
        family("llava"), probed, tmp_path, tuning=IntermediateOnly(layers="auto:2"), auto=options, max_steps=1
    )
    assert module.selection is not None
    assert [c.name for c in module.selection.criteria] == ["influence"]
    assert [(d.value, "out of memory" in d.reason) for d in decision_log() if d.name == "auto.criteria"] == [
        ("without gradients", True)
    ]
