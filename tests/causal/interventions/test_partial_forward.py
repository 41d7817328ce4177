"""A run computed again from the middle equals the whole run; what is not causal is refused."""

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from lightning_mm.causal.effects.attention_flow import contributions, flow_shares
from lightning_mm.causal.interventions.activation_cache import cache_activations
from lightning_mm.causal.interventions.interventions import (
    Intervention,
    add_vector,
    apply_interventions,
    patch_from,
    skip_blocks,
    zero_ablate,
)
from lightning_mm.causal.interventions.partial_forward import PartialForward
from lightning_mm.causal.questions.question import last_logits
from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.models.attention.interception import AttentionCall, attention_through
from lightning_mm.models.hooks import read_out
from tests.helpers.causal_models import FAMILIES, see_all, subject

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
"""Sums of the same float32 products in another order."""


@pytest.mark.parametrize("name", FAMILIES)
def test_variants_equal_whole_runs(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()
    base = cache_activations(one.mm, encoded.inputs)
    torch.testing.assert_close(base.logits, one.model(**encoded.inputs).logits[:, -1], **CLOSE)
    partial_forward, first = PartialForward(one.mm, base), int(encoded.constraint[0])
    vector = torch.randn(base.block_inputs[0].shape[2])
    for changes in (
        [zero_ablate("mlp", [1], torch.tensor([first]))],
        [add_vector("attention", [2], torch.tensor([first + 1]), vector), skip_blocks([1], torch.tensor([first + 2]))],
        [add_vector("residual", [0, 3], torch.tensor([first]), vector)],
    ):
        with apply_interventions(one.mm, changes):
            whole = last_logits(one.mm, encoded.inputs)
        low = min(min(each.layers) for each in changes)
        again = partial_forward.logits(changes, layer=low, start=partial_forward.restart_position(first))
        torch.testing.assert_close(again, whole, **CLOSE)
        assert (whole - base.logits).abs().max() > 3e-5, "what changes nothing shows nothing"


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_variants_of_one_batch_equal_each_alone(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    encoded, other = one.encode(), one.encode(seed=1)
    base, source = (cache_activations(one.mm, each.inputs) for each in (encoded, other))
    partial_forward = PartialForward(one.mm, base)
    rows = torch.arange(int(encoded.constraint[0]), encoded.length)[:, None]
    start = partial_forward.restart_position(int(rows.min()))
    together = partial_forward.logits(
        [patch_from("mlp", [1], rows, source.values)], variants=len(rows), layer=1, start=start
    )
    alone = [partial_forward.logits([patch_from("mlp", [1], row, source.values)], layer=1, start=start) for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_last_block_reads_out_as_the_models_logits(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    base = cache_activations(one.mm, one.encode().inputs)
    top = base.values["residual", one.layout.num_layers - 1]
    read = read_out(one.mm, top[0], base.returns_tuple)
    whole = one.model(**base.inputs).logits[0].float()
    torch.testing.assert_close(read, whole, **CLOSE)
    block = one.model.get_submodule(one.layout.layers[0])
    assert "forward" not in vars(block), "the blocks compute again afterwards"


def test_pictures_seen_both_ways_are_replayed_from_their_first_patch(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, "gemma3", tmp_path)
    encoded = one.encode()
    partial_forward = PartialForward(one.mm, cache_activations(one.mm, encoded.inputs))
    first, inner, after = int(encoded.image[0]), int(encoded.image[2]), int(encoded.image[-1]) + 1
    assert (partial_forward.restart_position(inner), partial_forward.restart_position(after)) == (first, after)


def test_what_looks_ahead_is_computed_again_whole(
    family: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject(family, "llava", tmp_path)
    inputs = one.encode().inputs
    see_all(monkeypatch)
    partial_forward = PartialForward(one.mm, cache_activations(one.mm, inputs))
    last = partial_forward.base.length - 1
    assert partial_forward.restart_position(last) == 0
    changes = [zero_ablate("mlp", [1], torch.tensor([last]))]
    whole = cache_activations(one.mm, inputs, changes).logits
    torch.testing.assert_close(partial_forward.logits(changes, layer=1), whole, **CLOSE)
    with pytest.raises(UserError, match=r"looks ahead.*\n.*--tracing.plain true"):
        partial_forward.logits(changes, layer=1, start=last)


@pytest.mark.parametrize("layer", [1, 3])
def test_what_is_not_what_was_recorded_is_refused(layer: int, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    base = cache_activations(one.mm, one.encode().inputs)
    with torch.no_grad():
        for parameter in one.model.get_submodule(one.layout.layers[layer]).parameters():
            parameter.mul_(1.5)
    with pytest.raises(UserError, match="changes the logits"):
        PartialForward(one.mm, base)


def test_a_replay_wrong_from_the_middle_on_only_is_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    base = cache_activations(one.mm, one.encode().inputs)
    base.block_inputs[one.layout.num_layers // 2] = base.block_inputs[0]
    base.values["residual", one.layout.num_layers // 2 - 1] = base.block_inputs[0]  # nothing is added between blocks
    with pytest.raises(UserError, match="changes the logits"):
        PartialForward(one.mm, base)


def test_rounding_of_single_logits_in_16_bits_is_no_fault(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    one.model.to(torch.bfloat16)
    encoded = one.encode()
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in encoded.inputs.items()}
    base = cache_activations(one.mm, inputs)
    spread = base.logits.std()
    base.logits[0, 5] += 0.1 * spread  # a unit in the last place of a logit of 20, where the spread is 1.25
    PartialForward(one.mm, base)
    base.logits += 0.1 * spread
    with pytest.raises(UserError, match="changes the logits"):
        PartialForward(one.mm, base)


@pytest.mark.parametrize("shared", [UserDict(full=torch.zeros(1)), {"full": torch.zeros(1)}, DynamicCache()])
def test_what_blocks_share_and_write_into_is_refused(
    shared: Any, family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, "llava", tmp_path)
    base = cache_activations(one.mm, one.encode().inputs)
    base.block_arguments[2][1]["shared_kv_states"] = {}
    PartialForward(one.mm, base)
    base.block_arguments[2][1]["shared_kv_states"] = shared
    with pytest.raises(UserError, match="Layer 2 is given"):
        PartialForward(one.mm, base)


def test_layers_without_ordinary_attention_are_recorded_and_told(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    encoded = one.encode()
    whole = cache_activations(one.mm, encoded.inputs)
    mixer = one.model.get_submodule(str(one.layout.blocks[1].attention))
    mixer.__class__ = type("DeltaNet", (type(mixer),), {"__module__": __name__})  # no eager attention beside it
    found = cache_activations(one.mm, encoded.inputs)
    assert sorted(found.attention_calls) == [layer for layer in range(one.layout.num_layers) if layer != 1]
    torch.testing.assert_close(found.logits, whole.logits, **CLOSE)
    with pytest.raises(UserError, match="Layer 1 mixes tokens by other means"):
        PartialForward(one.mm, found)
    with (
        pytest.raises(UserError, match=r"layer 1 \(DeltaNet\) cannot be changed"),
        attention_through(one.mm, AttentionCall.compute),
    ):
        pass
    shared, _ = flow_shares(one.mm, found, encoded, ("image->last",))
    assert shared.isnan().tolist() == [[layer == 1 for layer in range(one.layout.num_layers)]]
    with pytest.raises(UserError, match="other means than attention"):
        contributions(one.mm, found, 1, torch.tensor([3]))


@pytest.mark.parametrize("name", ["llava", "gemma3", "mllama"])
def test_kernels_without_masks_are_stood_in_for(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    inputs = one.encode().inputs
    whole = cache_activations(one.mm, inputs)
    mixer = one.model.get_submodule(str(one.layout.blocks[0].attention))
    mixer.config._attn_implementation_internal = "flash_attention_2"
    decision_log().clear()
    base = cache_activations(one.mm, inputs)
    torch.testing.assert_close(base.logits, whole.logits, **CLOSE)
    assert [(each.name, each.value) for each in decision_log()] == [("causal.attention", "sdpa")]
    assert {call.kernel for call in base.attention_calls.values()} == {"flash_attention_2"}
    assert mixer.config._attn_implementation == "flash_attention_2"


def test_capped_scores_are_stood_in_for_by_the_written_out_attention(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, "gemma3", tmp_path)
    call = cache_activations(one.mm, one.encode().inputs).attention_calls[0]
    capped = call.changed(kernel="flash_attention_2", options={**call.options, "softcap": 0.01})
    out, _ = capped.compute()
    assert torch.equal(out, capped.explicit()[0])
    assert not torch.allclose(out, call.explicit()[0])


def test_reading_out_forgets_the_last_batch(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "qwen2_5_vl", tmp_path)
    inputs = one.encode().inputs
    base = cache_activations(one.mm, inputs)
    states = base.values["residual", one.layout.num_layers - 1][0, :3]
    before = read_out(one.mm, states, base.returns_tuple)
    torch.testing.assert_close(before, one.model(**inputs).logits[0, :3].float(), **CLOSE)
    one.model(**{name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()})
    assert torch.equal(read_out(one.mm, states, base.returns_tuple), before)


def test_attention_of_the_model_is_its_own_again(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    encoded = one.encode()

    def kernels() -> set[str]:
        return {m.config._attn_implementation for m in one.model.modules() if hasattr(m, "config")}

    one.model(**encoded.inputs)  # transformers puts hooks of its own into towers, and keeps them
    before, hooks = kernels(), _hooks(one.model)
    cache_activations(one.mm, encoded.inputs)
    with pytest.raises(ZeroDivisionError):
        cache_activations(one.mm, encoded.inputs, [Intervention("fail", "mlp", (1,), None, lambda _: 1 // 0)])
    assert (kernels(), _hooks(one.model)) == (before, hooks)


def _hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_autocast_rounds_and_is_replayed_all_the_same(family: Callable[[str], Path], tmp_path: Path) -> None:
    """Rotations leave queries in float32 while products are in bfloat16: not the tolerance of a float32 model."""
    one = subject(family, "llava", tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        base = cache_activations(one.mm, one.encode().inputs)
        assert {call.value.dtype for call in base.attention_calls.values()} == {torch.bfloat16}
        replayed = PartialForward(one.mm, base).logits(start=base.length - 1, layer=2)
    error = (replayed - base.logits).square().mean().sqrt() / base.logits.std()
    assert float(error) < 0.05


def test_under_autocast_a_wrong_replay_is_still_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    """Whichever layer it is that forgets the tokens before; values that are those of their neighbours would pass."""
    one = subject(family, "llava", tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        for layer in range(one.layout.num_layers):
            base = cache_activations(one.mm, one.encode().inputs)
            base.attention_calls[layer].value.zero_()
            with pytest.raises(UserError, match="of their spread"):
                PartialForward(one.mm, base)
