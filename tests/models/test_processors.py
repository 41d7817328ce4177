"""Attention on processors is torch's own attention: outputs and gradients, under every mask, in every width."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_mm.models import processors
from lightning_mm.models.anatomy import Anatomy
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.models.processors import SHORT, WrittenOut, attend_on_processors, attending
from lightning_mm.models.unpadding import RealTokens, unpad_blocks, unpadded
from lightning_mm.objective import supervised_nll
from tests.tuning.test_policies import batch_of


class Grouped(nn.Module):
    """What transformers' function asks of an attention module whose keys serve several queries."""

    num_key_value_groups = 3
    is_causal = True


def attended(dtype: torch.dtype, here: bool, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of attention over 3 rows of 17 tokens with 2 heads of 16, under autocast for bfloat16."""
    drawn = torch.Generator().manual_seed(0)
    given = [torch.randn(3, 2, 17, 16, generator=drawn).to(dtype).requires_grad_() for _ in range(3)]
    attend: Any = attending(sdpa_attention_forward) if here else sdpa_attention_forward
    module = nn.Linear(1, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output, _ = attend(module, *given, options.pop("mask", None), **options)
    output.backward(torch.randn(output.shape, generator=drawn).to(output.dtype))
    return output.detach(), [each.grad for each in given if each.grad is not None]


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_attention_on_a_processor_is_wider_where_gradients_flow(mask: str) -> None:
    """Nearer to float32 than the bfloat16 kernel is, with the types that it has."""
    seen = torch.ones(17, 17).tril().bool()
    masks: dict[str, Any] = {"none": None, "bool": seen, "float": torch.zeros(17, 17).masked_fill(~seen, -1e9)}
    options = {"mask": masks[mask], "is_causal": False}
    exact, gradients = attended(torch.float32, False, **options)
    narrow, _ = attended(torch.bfloat16, False, **options)
    wide, found = attended(torch.bfloat16, True, **options)
    assert wide.dtype == narrow.dtype == torch.bfloat16
    assert [each.dtype for each in found] == [torch.bfloat16] * 3
    for one, other in zip((wide, *found), (exact, *gradients), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.03, atol=0.03)  # inputs were rounded to 8 bits


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 3),
    queries=st.integers(1, 20),
    keys=st.integers(1, 20),
    size=st.sampled_from([1, 4, 16]),
    mask=st.sampled_from(["none", "causal", "bool", "float"]),
    grouped=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
)
def test_written_out_it_is_what_the_kernel_computes(
    seed: int, rows: int, queries: int, keys: int, size: int, mask: str, grouped: bool, scale: float | None
) -> None:
    """float64: 1e-10 is the order of sums."""
    drawn = torch.Generator().manual_seed(seed)
    heads = (3, 1 if grouped else 3, 1 if grouped else 3)
    lengths = (queries, keys, keys)
    tensors = [
        torch.randn(rows, h, n, size, generator=drawn, dtype=torch.float64).requires_grad_()
        for h, n in zip(heads, lengths, strict=True)
    ]
    seen = torch.rand(rows, 1, queries, keys, generator=drawn) < 0.6
    seen[..., 0] = True  # of a row that sees nothing, torch says 0
    masks = {"bool": seen, "float": torch.randn(rows, 1, queries, keys, generator=drawn, dtype=torch.float64)}
    options: dict[str, Any] = {"is_causal": mask == "causal", "enable_gqa": grouped, "scale": scale}

    def computed() -> list[Tensor]:
        query, key, value = tensors
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=masks.get(mask), **options)
        return [output, *torch.autograd.grad(output.square().sum(), tensors)]

    expected = computed()
    with WrittenOut():
        found = computed()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_grouped_keys_and_transformers_own_causality() -> None:
    """Through transformers' function, which repeats keys and finds out itself what is causal; float32."""
    drawn = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 9, 4, generator=drawn).requires_grad_()
    key, value = (torch.randn(2, 2, 9, 4, generator=drawn).requires_grad_() for _ in range(2))
    outputs: list[Tensor] = []
    for attend in (sdpa_attention_forward, attending(sdpa_attention_forward)):
        output, _ = attend(Grouped(), query, key, value, None)
        outputs.append(output)
    torch.testing.assert_close(outputs[1], outputs[0])


def test_a_row_of_padding_that_sees_nothing_gives_numbers() -> None:
    query = torch.randn(1, 1, 3, 4, requires_grad=True)
    mask = torch.tensor([[False, False, False], [True, False, False], [True, True, False]])
    with WrittenOut():
        output = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    (gradient,) = torch.autograd.grad(output.sum(), [query])
    assert output.isfinite().all()
    assert gradient.isfinite().all()


def test_dropout_is_kept() -> None:
    torch.manual_seed(0)
    ones = torch.ones(1, 1, 200, 1, requires_grad=True)
    with WrittenOut():
        output = F.scaled_dot_product_attention(ones, ones, ones, dropout_p=0.5)
    assert output.mean().item() == pytest.approx(1.0, abs=0.05)  # 200 means of 200: 0.005 is one standard error
    assert output.std().item() > 0.05


@pytest.mark.parametrize(("length", "written"), [(SHORT, True), (SHORT + 1, False)])
def test_long_rows_are_left_to_the_kernel(length: int, written: bool) -> None:
    """The weights of all pairs are seen by what keeps tensors for backward, or are not."""
    heads = torch.randn(1, 1, length, 4, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attending(sdpa_attention_forward)(nn.Linear(1, 1), heads, heads, heads, None, scaling=1.0)
    assert any(shape[-2:] == (length, length) for shape in kept) == written


def test_it_stands_inside_of_what_puts_tokens_back_into_rows(
    family: Callable[[str], Path], data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever was asked for first: four short rows side by side are no long one."""
    registered: dict[str, Any] = {"sdpa": sdpa_attention_forward}
    monkeypatch.setattr(AttentionInterface, "_global_mapping", registered)
    model = load_model(Backbone(path=str(family("llava"))))
    unpad_blocks(model, Anatomy.of(model))
    attend_on_processors()
    seen: list[tuple[int, int]] = []
    real = processors._attended

    def attended(query: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append((query.shape[0], query.shape[-2]))
        return real(query, *args, **options)

    monkeypatch.setattr(processors, "_attended", attended)
    batch = batch_of(family("llava"), data, 4)
    monkeypatch.setattr(processors, "SHORT", batch.regions.shape[1])
    with unpadded(RealTokens(batch.real, *batch.regions.shape)):
        supervised_nll(model, model.lm_head, batch)
    assert tuple(batch.regions.shape) in seen


def test_attention_without_gradients_is_left_alone() -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    def attend(module: nn.Module, query: Tensor, *_: Any) -> tuple[Tensor, None]:
        seen.append((query.dtype, bool(torch._C._len_torch_function_stack())))
        return query, None

    run: Any = attending(attend)
    heads = torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        run(None, heads, heads, heads)
    run(None, heads.detach(), heads, heads)
    run(None, heads.float(), heads.float(), heads.float())
    run(None, heads, heads, heads)
    assert [dtype for dtype, _ in seen] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert [written for _, written in seen] == [False, False, True, True]
