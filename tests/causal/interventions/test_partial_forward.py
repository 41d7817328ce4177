"""A run computed again from the middle equals the whole run; what is not causal is refused."""

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from lightning_mm.causal.effects.attention_flow import contributions, shares
from lightning_mm.causal.interventions.activation_cache import record
from lightning_mm.causal.interventions.interventions import Intervention, add, intervened, patch, skip, zero
from lightning_mm.causal.interventions.partial_forward import Replay
from lightning_mm.causal.questions.question import last_logits
from lightning_mm.core.decisions import decide
from lightning_mm.core.errors import UserError
from lightning_mm.models.attention.interception import AttentionCall, attention_through
from lightning_mm.models.hooks import read_out
from tests.helpers.causal_models import FAMILIES, see_all, subject

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
"""Sums of the same float32 products in another order."""


@pytest.mark.parametrize("name", FAMILIES)
def test_variants_equal_whole_runs(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    asked = one.ask()
    base = record(one.mm, asked.inputs)
    torch.testing.assert_close(base.logits, one.model(**asked.inputs).logits[:, -1], **CLOSE)
    replay, first = Replay(one.mm, base), int(asked.constraint[0])
    vector = torch.randn(base.entered[0].shape[2])
    for changes in (
        [zero("mlp", [1], torch.tensor([first]))],
        [add("attention", [2], torch.tensor([first + 1]), vector), skip([1], torch.tensor([first + 2]))],
        [add("residual", [0, 3], torch.tensor([first]), vector)],
    ):
        with intervened(one.mm, changes):
            whole = last_logits(one.mm, asked.inputs)
        low = min(min(each.layers) for each in changes)
        again = replay.logits(changes, layer=low, start=replay.start_for(first))
        torch.testing.assert_close(again, whole, **CLOSE)
        assert (whole - base.logits).abs().max() > 3e-5, "what changes nothing shows nothing"


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_variants_of_one_batch_equal_each_alone(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    asked, other = one.ask(), one.ask(seed=1)
    base, source = (record(one.mm, each.inputs) for each in (asked, other))
    replay = Replay(one.mm, base)
    rows = torch.arange(int(asked.constraint[0]), asked.length)[:, None]
    start = replay.start_for(int(rows.min()))
    together = replay.logits([patch("mlp", [1], rows, source.values)], variants=len(rows), layer=1, start=start)
    alone = [replay.logits([patch("mlp", [1], row, source.values)], layer=1, start=start) for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_last_block_reads_out_as_the_models_logits(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    base = record(one.mm, one.ask().inputs)
    top = base.values["residual", one.layout.num_layers - 1]
    read = read_out(one.mm, top[0], base.tuples)
    whole = one.model(**base.inputs).logits[0].float()
    torch.testing.assert_close(read, whole, **CLOSE)
    block = one.model.get_submodule(one.layout.layers[0])
    assert "forward" not in vars(block), "the blocks compute again afterwards"


def test_pictures_seen_both_ways_are_replayed_from_their_first_patch(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, "gemma3", tmp_path)
    asked = one.ask()
    replay = Replay(one.mm, record(one.mm, asked.inputs))
    first, inner, after = int(asked.image[0]), int(asked.image[2]), int(asked.image[-1]) + 1
    assert (replay.start_for(inner), replay.start_for(after)) == (first, after)


def test_what_looks_ahead_is_computed_again_whole(
    family: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject(family, "llava", tmp_path)
    inputs = one.ask().inputs
    see_all(monkeypatch)
    replay = Replay(one.mm, record(one.mm, inputs))
    last = replay.base.length - 1
    assert replay.start_for(last) == 0
    changes = [zero("mlp", [1], torch.tensor([last]))]
    whole = record(one.mm, inputs, changes).logits
    torch.testing.assert_close(replay.logits(changes, layer=1), whole, **CLOSE)
    with pytest.raises(UserError, match=r"looks ahead.*\n.*--tracing.plain true"):
        replay.logits(changes, layer=1, start=last)


@pytest.mark.parametrize("layer", [1, 3])
def test_what_is_not_what_was_recorded_is_refused(layer: int, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    base = record(one.mm, one.ask().inputs)
    with torch.no_grad():
        for parameter in one.model.get_submodule(one.layout.layers[layer]).parameters():
            parameter.mul_(1.5)
    with pytest.raises(UserError, match="changes the logits"):
        Replay(one.mm, base)


def test_a_replay_wrong_from_the_middle_on_only_is_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    base = record(one.mm, one.ask().inputs)
    base.entered[one.layout.num_layers // 2] = base.entered[0]
    base.values["residual", one.layout.num_layers // 2 - 1] = base.entered[0]  # nothing is added between blocks
    with pytest.raises(UserError, match="changes the logits"):
        Replay(one.mm, base)


def test_rounding_of_single_logits_in_16_bits_is_no_fault(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    one.model.to(torch.bfloat16)
    asked = one.ask()
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in asked.inputs.items()}
    base = record(one.mm, inputs)
    spread = base.logits.std()
    base.logits[0, 5] += 0.1 * spread  # a unit in the last place of a logit of 20, where the spread is 1.25
    Replay(one.mm, base)
    base.logits += 0.1 * spread
    with pytest.raises(UserError, match="changes the logits"):
        Replay(one.mm, base)


@pytest.mark.parametrize("shared", [UserDict(full=torch.zeros(1)), {"full": torch.zeros(1)}, DynamicCache()])
def test_what_blocks_share_and_write_into_is_refused(
    shared: Any, family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, "llava", tmp_path)
    base = record(one.mm, one.ask().inputs)
    base.arguments[2][1]["shared_kv_states"] = {}
    Replay(one.mm, base)
    base.arguments[2][1]["shared_kv_states"] = shared
    with pytest.raises(UserError, match="Layer 2 is given"):
        Replay(one.mm, base)


def test_layers_without_ordinary_attention_are_recorded_and_told(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    asked = one.ask()
    whole = record(one.mm, asked.inputs)
    mixer = one.model.get_submodule(str(one.layout.blocks[1].attention))
    mixer.__class__ = type("DeltaNet", (type(mixer),), {"__module__": __name__})  # no eager attention beside it
    found = record(one.mm, asked.inputs)
    assert sorted(found.calls) == [layer for layer in range(one.layout.num_layers) if layer != 1]
    torch.testing.assert_close(found.logits, whole.logits, **CLOSE)
    with pytest.raises(UserError, match="Layer 1 mixes tokens by other means"):
        Replay(one.mm, found)
    with (
        pytest.raises(UserError, match=r"layer 1 \(DeltaNet\) cannot be changed"),
        attention_through(one.mm, AttentionCall.compute),
    ):
        pass
    shared, _ = shares(one.mm, found, asked, ("image->last",))
    assert shared.isnan().tolist() == [[layer == 1 for layer in range(one.layout.num_layers)]]
    with pytest.raises(UserError, match="other means than attention"):
        contributions(one.mm, found, 1, torch.tensor([3]))


@pytest.mark.parametrize("name", ["llava", "gemma3", "mllama"])
def test_kernels_without_masks_are_stood_in_for(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    inputs = one.ask().inputs
    whole = record(one.mm, inputs)
    mixer = one.model.get_submodule(str(one.layout.blocks[0].attention))
    mixer.config._attn_implementation_internal = "flash_attention_2"
    decide.clear()
    base = record(one.mm, inputs)
    torch.testing.assert_close(base.logits, whole.logits, **CLOSE)
    assert [(each.name, each.value) for each in decide] == [("causal.attention", "sdpa")]
    assert {call.kernel for call in base.calls.values()} == {"flash_attention_2"}
    assert mixer.config._attn_implementation == "flash_attention_2"


def test_capped_scores_are_stood_in_for_by_the_written_out_attention(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, "gemma3", tmp_path)
    call = record(one.mm, one.ask().inputs).calls[0]
    capped = call.changed(kernel="flash_attention_2", options={**call.options, "softcap": 0.01})
    out, _ = capped.compute()
    assert torch.equal(out, capped.explicit()[0])
    assert not torch.allclose(out, call.explicit()[0])


def test_reading_out_forgets_the_last_batch(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "qwen2_5_vl", tmp_path)
    inputs = one.ask().inputs
    base = record(one.mm, inputs)
    states = base.values["residual", one.layout.num_layers - 1][0, :3]
    before = read_out(one.mm, states, base.tuples)
    torch.testing.assert_close(before, one.model(**inputs).logits[0, :3].float(), **CLOSE)
    one.model(**{name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()})
    assert torch.equal(read_out(one.mm, states, base.tuples), before)


def test_attention_of_the_model_is_its_own_again(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    asked = one.ask()

    def kernels() -> set[str]:
        return {m.config._attn_implementation for m in one.model.modules() if hasattr(m, "config")}

    one.model(**asked.inputs)  # transformers puts hooks of its own into towers, and keeps them
    before, hooks = kernels(), _hooks(one.model)
    record(one.mm, asked.inputs)
    with pytest.raises(ZeroDivisionError):
        record(one.mm, asked.inputs, [Intervention("fail", "mlp", (1,), None, lambda _: 1 // 0)])
    assert (kernels(), _hooks(one.model)) == (before, hooks)


def _hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_autocast_rounds_and_is_replayed_all_the_same(family: Callable[[str], Path], tmp_path: Path) -> None:
    """Rotations leave queries in float32 while products are in bfloat16: not the tolerance of a float32 model."""
    one = subject(family, "llava", tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        base = record(one.mm, one.ask().inputs)
        assert {call.value.dtype for call in base.calls.values()} == {torch.bfloat16}
        replayed = Replay(one.mm, base).logits(start=base.length - 1, layer=2)
    error = (replayed - base.logits).square().mean().sqrt() / base.logits.std()
    assert float(error) < 0.05


def test_under_autocast_a_wrong_replay_is_still_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    """Whichever layer it is that forgets the tokens before; values that are those of their neighbours would pass."""
    one = subject(family, "llava", tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        for layer in range(one.layout.num_layers):
            base = record(one.mm, one.ask().inputs)
            base.calls[layer].value.zero_()
            with pytest.raises(UserError, match="of their spread"):
                Replay(one.mm, base)
