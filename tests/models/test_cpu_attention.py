"""Attention on processors is torch's own attention: outputs and gradients, under every mask, in every width."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_mm.execution.loss import supervised_nll
from lightning_mm.models.attention import cpu_kernels
from lightning_mm.models.attention.cpu_kernels import (
    MAX_SHORT_ROW,
    MIN_MEAN_ROW,
    Rows,
    attends_row_by_row,
    cpu_attention,
    split_unpadded_rows,
    use_cpu_attention,
)
from lightning_mm.models.attention.varlen import RealTokens, unpad_blocks, unpadded
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone, load_model
from tests.helpers.data import batch_of


class Grouped(nn.Module):
    """What transformers' function asks of an attention module whose keys serve several queries."""

    is_causal = True

    def __init__(self, num_key_value_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


def attended(dtype: torch.dtype, here: bool, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of attention over 3 rows of 17 tokens with 2 heads of 16, under autocast for bfloat16."""
    drawn = torch.Generator().manual_seed(0)
    given = [torch.randn(3, 2, 17, 16, generator=drawn).to(dtype).requires_grad_() for _ in range(3)]
    attend: Any = cpu_attention(sdpa_attention_forward) if here else sdpa_attention_forward
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
    groups=st.sampled_from([1, 3, 6]),
    scale=st.sampled_from([None, 0.3]),
    frozen=st.sampled_from([(), (1,), (2,), (1, 2)]),
)
def test_short_rows_are_what_the_kernel_computes(
    seed: int,
    rows: int,
    queries: int,
    keys: int,
    size: int,
    mask: str,
    groups: int,
    scale: float | None,
    frozen: tuple[int, ...],
) -> None:
    """Outputs and gradients, values of another size; float64: 1e-10 is the order of sums."""
    drawn = torch.Generator().manual_seed(seed)
    keys = max(keys, queries) if mask == "causal" else keys
    sizes = ((6, queries, size), (groups, keys, size), (groups, keys, size + 1))
    tensors = [torch.randn(rows, *each, generator=drawn, dtype=torch.float64) for each in sizes]
    trained = [each.requires_grad_() for index, each in enumerate(tensors) if index not in frozen]
    seen = torch.rand(rows, 1, queries, keys, generator=drawn) < 0.6
    seen[..., 0] = True  # of a row that sees nothing, torch says 0
    masks = {"bool": seen, "float": torch.randn(rows, 1, queries, keys, generator=drawn, dtype=torch.float64)}
    module = Grouped(6 // groups)
    found = []
    for attend in (cpu_attention(sdpa_attention_forward), sdpa_attention_forward):
        run: Any = attend
        output, _ = run(module, *tensors, masks.get(mask), scaling=scale, is_causal=mask == "causal")
        found.append([output, *torch.autograd.grad(output.square().sum(), trained)])
    assert "RowsAttention" in str(found[0][0].grad_fn.next_functions) + str(found[0][0].grad_fn)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_what_is_causal_is_found_out_as_transformers_does() -> None:
    """By the module, or by what is asked for; float32."""
    drawn = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 9, 4, generator=drawn).requires_grad_()
    key, value = (torch.randn(2, 2, 9, 4, generator=drawn).requires_grad_() for _ in range(2))
    for asked in (None, True, False):
        outputs = []
        for attend in (sdpa_attention_forward, cpu_attention(sdpa_attention_forward)):
            run: Any = attend
            outputs.append(run(Grouped(3), query, key, value, None, is_causal=asked)[0])
        torch.testing.assert_close(outputs[1], outputs[0])


def test_a_row_of_padding_that_sees_nothing_gives_numbers() -> None:
    query = torch.randn(1, 1, 3, 4, requires_grad=True)
    mask = torch.tensor([[False, False, False], [True, False, False], [True, True, False]])
    output, _ = cpu_attention(sdpa_attention_forward)(nn.Linear(1, 1), query, query, query, mask)
    (gradient,) = torch.autograd.grad(output.sum(), [query])
    assert output.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("asked", ["dropout", "learned"])
def test_what_only_the_kernel_can_do_is_left_to_it(asked: str) -> None:
    """Dropout, and a bias that is learned."""
    torch.manual_seed(0)
    ones = torch.ones(1, 1, 200, 1, requires_grad=True)
    bias = torch.zeros(1, 1, 200, 200, requires_grad=asked == "learned")
    options = {"dropout": 0.5} if asked == "dropout" else {}
    output, _ = cpu_attention(sdpa_attention_forward)(nn.Linear(1, 1), ones, ones, ones, bias, **options)
    if asked == "dropout":
        assert output.mean().item() == pytest.approx(1.0, abs=0.05)  # 200 means of 200: 0.005 is one standard error
        assert output.std().item() > 0.05
    else:
        (gradient,) = torch.autograd.grad(output.square().sum(), bias)
        assert gradient.shape == bias.shape


@pytest.mark.parametrize(("length", "written"), [(MAX_SHORT_ROW, True), (MAX_SHORT_ROW + 1, False)])
def test_long_rows_are_left_to_the_kernel(length: int, written: bool) -> None:
    """The weights of all pairs are seen by what keeps tensors for backward, or are not."""
    heads = torch.randn(1, 1, length, 4, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cpu_attention(sdpa_attention_forward)(nn.Linear(1, 1), heads, heads, heads, None, scaling=1.0)
    assert any(shape[-2:] == (length, length) for shape in kept) == written


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    left=st.booleans(),
    shape=st.sampled_from(["causal", "free", "window"]),
    added=st.booleans(),
)
def test_rows_side_by_side_are_rows_in_a_batch(
    seed: int, lengths: list[int], left: bool, shape: str, added: bool
) -> None:
    """Uneven rows, padded on either side, under masks as models make them; float64, order of sums."""
    drawn = torch.Generator().manual_seed(seed)
    rows, length = len(lengths), max(lengths)
    real = torch.zeros(rows, length, dtype=torch.bool)
    for row, count in enumerate(lengths):
        real[row, length - count if left else 0 :][:count] = True
    every = torch.ones(length, length, dtype=torch.bool)
    seen = {"causal": every.tril(), "free": every, "window": every.tril() & ~every.tril(-3)}[shape]
    mask = seen & real[:, None, None, :]
    given = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf) if added else mask
    tokens = RealTokens(real.flatten().nonzero()[:, 0], rows, length)
    made = split_unpadded_rows(tokens.index, rows, length, given)
    assert not made  # rows as short as these stay together
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "MIN_MEAN_ROW", 0)
        made = split_unpadded_rows(tokens.index, rows, length, given)
    assert [each.queries.stop - each.queries.start for each in made] == [count for count in lengths if count]
    packed = [torch.randn(1, n, len(tokens.index), 4, generator=drawn, dtype=torch.float64) for n in (4, 2, 2)]
    packed = [each.requires_grad_() for each in packed]
    attend: Any = cpu_attention(sdpa_attention_forward)
    alone = attend.attend_unpadded(lambda _: made, *packed, given)
    in_rows = [tokens.unpack(each.transpose(1, 2)).transpose(1, 2) for each in packed]
    together = tokens.pack(sdpa_attention_forward(Grouped(2), *in_rows, mask)[0])
    drawn_gradient = torch.randn(alone.shape, generator=drawn, dtype=torch.float64)
    for one, other in zip(
        (alone, *torch.autograd.grad(alone, packed, drawn_gradient)),
        (together, *torch.autograd.grad(together, packed, drawn_gradient)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_real_tokens_that_see_padding_stay_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out, it would change what they compute."""
    monkeypatch.setattr(cpu_kernels, "MIN_MEAN_ROW", 0)
    index = torch.tensor([0, 1, 2, 3, 4])  # a row of three, and one of two
    causal = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    assert len(split_unpadded_rows(index, 2, 3, causal)) == 2
    assert not split_unpadded_rows(index, 2, 3, torch.ones(2, 1, 3, 3, dtype=torch.bool))
    assert not split_unpadded_rows(index, 2, 3, torch.zeros(2, 1, 3, 3))
    assert not split_unpadded_rows(index, 2, 3, None)
    assert not split_unpadded_rows(index, 2, 3, causal[:, 0])


def test_rows_are_attended_to_alone_from_some_length_on() -> None:
    assert attends_row_by_row([MIN_MEAN_ROW, MIN_MEAN_ROW, MIN_MEAN_ROW + 20])
    assert attends_row_by_row([MIN_MEAN_ROW - 20, MIN_MEAN_ROW + 20])
    assert not attends_row_by_row([MIN_MEAN_ROW - 20, MIN_MEAN_ROW])
    assert not attends_row_by_row([MIN_MEAN_ROW, MAX_SHORT_ROW + 1])
    assert not attends_row_by_row([])


@pytest.mark.parametrize("alone", [False, True])
def test_it_stands_inside_of_what_puts_tokens_back_into_rows(
    family: Callable[[str], Path], data: dict[str, Path], monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """Four short rows side by side are no long one; and alone they are four."""
    model = load_model(Backbone(path=str(family("llava"))))
    undo = ExitStack()
    use_cpu_attention(model, undo)
    unpad_blocks(MultimodalModel.of(model), undo)
    seen: list[list[int]] = []
    real = cpu_kernels._attend_rows

    def attended(query: Tensor, key: Tensor, value: Tensor, rows: Sequence[Rows], options: dict[str, Any]) -> Tensor:
        seen.append([each.count * 1000 + len(query[each.queries]) // each.count for each in rows])
        return real(query, key, value, rows, options)

    monkeypatch.setattr(cpu_kernels, "_attend_rows", attended)
    batch = batch_of(family("llava"), data, 4)
    rows, length = batch.regions.shape
    monkeypatch.setattr(cpu_kernels, "MAX_SHORT_ROW", length)
    monkeypatch.setattr(cpu_kernels, "MIN_MEAN_ROW", 0 if alone else length)
    with unpadded(RealTokens(batch.real, rows, length)):
        nll = supervised_nll(model, model.lm_head, batch).nll
    lengths = torch.bincount(batch.real // length).tolist()
    assert ([1000 + each for each in lengths] if alone else [1000 * rows + length]) in seen
    undo.close()
    seen.clear()
    expected = supervised_nll(model, model.lm_head, batch).nll
    assert not seen
    assert nll.item() == pytest.approx(expected.item(), rel=1e-5)  # float32, another order of sums


def test_attention_without_gradients_is_left_alone() -> None:
    seen: list[torch.dtype] = []

    def attend(module: nn.Module, query: Tensor, *_: Any) -> tuple[Tensor, None]:
        seen.append(query.dtype)
        return query, None

    run: Any = cpu_attention(attend)
    heads = torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        run(None, heads, heads, heads)
        assert run.attend_unpadded(lambda _: 1 / 0, heads, heads, heads) is None
    run(None, heads.detach(), heads, heads)
    assert seen == [torch.bfloat16] * 2
    run(None, heads, heads, heads)
    assert len(seen) == 2
