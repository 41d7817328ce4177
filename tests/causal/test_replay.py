"""A run computed again from the middle equals the whole run; what is not causal is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.causal.interventions import Intervention, add, intervened, patch, skip, zero
from lightning_mm.causal.readout import read_out
from lightning_mm.causal.recording import last_logits, record
from lightning_mm.causal.replay import Replay
from lightning_mm.errors import UserError
from tests.causal.subjects import FAMILIES, subject

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
"""Sums of the same float32 products in another order."""


@pytest.mark.parametrize("name", FAMILIES)
def test_variants_equal_whole_runs(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    asked = one.ask()
    base = record(one.model, one.anatomy, asked.inputs)
    torch.testing.assert_close(base.logits, one.model(**asked.inputs).logits[:, -1], **CLOSE)
    replay, first = Replay(one.model, one.anatomy, base), int(asked.constraint[0])
    vector = torch.randn(base.entered[0].shape[2])
    for changes in (
        [zero("mlp", [1], torch.tensor([first]))],
        [add("attention", [2], torch.tensor([first + 1]), vector), skip([1], torch.tensor([first + 2]))],
        [add("residual", [0, 3], torch.tensor([first]), vector)],
    ):
        with intervened(one.model, one.anatomy, changes):
            whole = last_logits(one.model, one.anatomy, asked.inputs)
        low = min(min(each.layers) for each in changes)
        again = replay.logits(changes, layer=low, start=replay.start_for(first))
        torch.testing.assert_close(again, whole, **CLOSE)
        assert (whole - base.logits).abs().max() > 3e-5, "what changes nothing shows nothing"


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_variants_of_one_batch_equal_each_alone(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    asked, other = one.ask(), one.ask(seed=1)
    base, source = (record(one.model, one.anatomy, each.inputs) for each in (asked, other))
    replay = Replay(one.model, one.anatomy, base)
    rows = torch.arange(int(asked.constraint[0]), asked.length)[:, None]
    start = replay.start_for(int(rows.min()))
    together = replay.logits([patch("mlp", [1], rows, source.values)], variants=len(rows), layer=1, start=start)
    alone = [replay.logits([patch("mlp", [1], row, source.values)], layer=1, start=start) for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_last_block_reads_out_as_the_models_logits(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    base = record(one.model, one.anatomy, one.ask().inputs)
    top = base.values["residual", one.anatomy.num_layers - 1]
    read = read_out(one.model, one.anatomy, top[0], base.tuples)
    whole = one.model(**base.inputs).logits[0].float()
    torch.testing.assert_close(read, whole, **CLOSE)
    block = one.model.get_submodule(one.anatomy.layers[0])
    assert "forward" not in vars(block), "the blocks compute again afterwards"


def test_pictures_seen_both_ways_are_replayed_from_their_first_patch(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, "gemma3", tmp_path)
    asked = one.ask()
    replay = Replay(one.model, one.anatomy, record(one.model, one.anatomy, asked.inputs))
    first, inner, after = int(asked.image[0]), int(asked.image[2]), int(asked.image[-1]) + 1
    assert (replay.start_for(inner), replay.start_for(after)) == (first, after)


def test_what_looks_ahead_is_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    base = record(one.model, one.anatomy, one.ask().inputs)
    call = base.calls[2]
    assert call.mask is not None
    base.calls[2] = call.changed(mask=torch.zeros_like(call.mask))
    with pytest.raises(UserError, match="looks ahead"):
        Replay(one.model, one.anatomy, base)


def test_what_is_not_what_was_recorded_is_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    base = record(one.model, one.anatomy, one.ask().inputs)
    with torch.no_grad():
        next(one.model.get_submodule(one.anatomy.layers[2]).parameters()).mul_(1.5)
    with pytest.raises(UserError, match="changes the logits"):
        Replay(one.model, one.anatomy, base)


def test_attention_of_the_model_is_its_own_again(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    asked = one.ask()

    def kernels() -> set[str]:
        return {m.config._attn_implementation for m in one.model.modules() if hasattr(m, "config")}

    one.model(**asked.inputs)  # transformers puts hooks of its own into towers, and keeps them
    before, hooks = kernels(), _hooks(one.model)
    record(one.model, one.anatomy, asked.inputs)
    with pytest.raises(ZeroDivisionError):
        record(one.model, one.anatomy, asked.inputs, [Intervention("fail", "mlp", (1,), None, lambda _: 1 // 0)])
    assert (kernels(), _hooks(one.model)) == (before, hooks)


def _hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
