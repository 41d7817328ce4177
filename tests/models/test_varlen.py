"""Blocks without padding give what padded blocks give: losses, gradients, every family, recomputed or not."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mm.data.batch import Batch
from lightning_mm.data.collator import Collator
from lightning_mm.data.readers.conversations import read_conversations
from lightning_mm.execution.activation_checkpointing import checkpoint_blocks
from lightning_mm.execution.loss import supervised_nll
from lightning_mm.models.attention.cpu_kernels import use_cpu_attention
from lightning_mm.models.attention.varlen import RealTokens, unpad_blocks, unpadded
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.models.processor import load_processing
from lightning_mm.testing.tiny import FAMILIES
from tests.helpers.data import Family, make_uneven_rows
from tests.helpers.training import scale_of


def loaded(folder: Path, attention: Any = "auto") -> tuple[Any, ModelLayout]:
    model: Any = load_model(Backbone(path=str(folder), attention=attention))
    return model.eval(), ModelLayout.of(model)


def stepped(model: Any, layout: ModelLayout, batch: Batch, tokens: RealTokens | None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with unpadded(tokens):
        nll = supervised_nll(model, model.get_submodule(layout.head), batch).nll
    nll.backward()  # outside: what is recomputed must find its tokens again
    return {"": nll.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def tokens_of(batch: Batch) -> RealTokens:
    return RealTokens(batch.real, *batch.regions.shape)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_losses_and_gradients_are_those_of_padded_rows(
    name: str, recomputed: bool, family: Family, tmp_path: Path
) -> None:
    """1e-5 of the largest entry: float32 sums over tokens in another order."""
    model, layout = loaded(family(name))
    batch = Collator(load_processing(str(family(name))))(read_conversations(make_uneven_rows(tmp_path)).samples)
    assert len(batch.real) < batch.regions.numel()
    expected = stepped(model, layout, batch, None)
    undo = ExitStack()
    use_cpu_attention(model, undo)
    blocks = unpad_blocks(MultimodalModel(model, layout), undo)
    if recomputed:
        checkpoint_blocks(model, layout.layers, ExitStack())
    lengths: set[int] = set()
    rows: set[int] = set()
    for index in range(layout.num_layers):
        norm = next(m for m in model.get_submodule(layout.layers[index]).children() if "Norm" in type(m).__name__)
        norm.register_forward_pre_hook(lambda _, args: lengths.add(args[0].shape[1]) or rows.add(args[0].shape[0]))
    found = stepped(model, layout, batch, tokens_of(batch))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        bound = 1e-5 * float(scale_of(key, expected).abs().max()) + 1e-9
        assert float((found[key] - value).abs().max()) <= bound, key
    if name == "mllama":  # its blocks are given pictures by row
        assert rows == {len(batch)}
    else:
        assert (rows, lengths, len(blocks)) == ({1}, {len(batch.real)}, layout.num_layers)


def test_rows_do_not_see_one_another(family: Family, tmp_path: Path) -> None:
    """Another last row, and another number of tokens, change nothing of the others but the order of sums."""
    model, layout = loaded(family("llava"))
    undo = ExitStack()
    use_cpu_attention(model, undo)
    unpad_blocks(MultimodalModel(model, layout), undo)
    collator, samples = (
        Collator(load_processing(str(family("llava")))),
        read_conversations(make_uneven_rows(tmp_path)).samples,
    )
    hidden = []
    for chosen in (samples[:3], (*samples[:2], samples[3])):
        batch = collator(chosen)
        held: list[torch.Tensor] = []
        handle = model.get_submodule(layout.layers[-1]).register_forward_hook(lambda _, __, out, h=held: h.append(out))
        stepped(model, layout, batch, tokens_of(batch))
        handle.remove()
        length = int((batch.regions[0] != 0).sum())
        hidden.append(held[0][0, :length].detach())
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-5, atol=1e-6)


def test_written_out_attention_stays_padded(family: Family, tmp_path: Path) -> None:
    model, layout = loaded(family("llava"), "eager")
    assert unpad_blocks(MultimodalModel(model, layout), ExitStack()) == ()


def test_outside_nothing_is_left_out(family: Family, tmp_path: Path) -> None:
    """Looks and generation run the prepared model as it is."""
    model, layout = loaded(family("llava"))
    batch = Collator(load_processing(str(family("llava"))))(read_conversations(make_uneven_rows(tmp_path)).samples)
    with torch.no_grad():
        expected = model(**batch.inputs).logits
        unpad_blocks(MultimodalModel(model, layout), ExitStack())
        assert torch.equal(model(**batch.inputs).logits, expected)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 3))
def test_packed_and_unpacked_is_the_same(lengths: list[int], width: int) -> None:
    rows, length = len(lengths), max(lengths)
    real_BL = torch.arange(length) < torch.tensor(lengths)[:, None]
    tokens = RealTokens(real_BL.flatten().nonzero().squeeze(1), rows, length)
    values_BLD = torch.randn(rows, length, width, requires_grad=True)
    packed = tokens.pack(values_BLD)
    assert packed.shape == (1, sum(lengths), width)
    assert torch.equal(packed[0], values_BLD[real_BL])
    back = tokens.unpack(packed)
    assert torch.equal(back, values_BLD * real_BL[..., None])
    weight = torch.randn_like(back)
    (gradient,) = torch.autograd.grad((back * weight).sum(), [values_BLD])
    assert torch.equal(gradient, weight * real_BL[..., None])
