"""Hidden states out of live modules: those of transformers itself, whatever is wrapped around the model."""

import copy
import gc
import warnings
import weakref
from contextlib import ExitStack

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_mm.analysis.hidden_states import pool
from lightning_mm.execution.activation_checkpointing import checkpoint_blocks
from lightning_mm.models.handle import MultimodalModel, unwrap_model
from lightning_mm.models.hooks import block_io
from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.loading import Backbone, load_model
from tests.helpers.data import FAMILIES, Data, Family, batch_of


def taken(model: nn.Module, layout: ModelLayout, inputs: dict[str, Tensor]) -> list[Tensor]:
    found: dict[int, Tensor] = {}

    def receive(index: int, hidden: Tensor) -> None:
        found[index] = hidden.detach().clone()

    inner = unwrap_model(model)
    with torch.no_grad(), block_io(MultimodalModel(inner, layout), receive):
        inner(**inputs, use_cache=False)
    return [found[index] for index in range(layout.num_layers + 1)]


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def llava(family: Family, data: Data) -> tuple[nn.Module, ModelLayout, dict[str, Tensor]]:
    model = load_model(Backbone(path=str(family("llava")))).eval()
    return model, ModelLayout.of(model), batch_of(family("llava"), data).inputs


@pytest.mark.parametrize("name", [*FAMILIES, "qwen2_vl", "idefics3", "mllama"])
def test_every_slice_is_that_of_transformers(name: str, family: Family, data: Data) -> None:
    """Exactly: it is the same tensor. transformers' last one has passed the final norm, so ours is before it."""
    model = load_model(Backbone(path=str(family(name)))).eval()
    layout = ModelLayout.of(model)
    inputs = batch_of(family(name), data).inputs
    with torch.no_grad():
        model(**inputs, use_cache=False)  # transformers may put hooks of its own into a tower, for good
    before = num_hooks(model)
    ours = taken(model, layout, inputs)
    assert num_hooks(model) == before
    with torch.no_grad():
        theirs = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == layout.num_layers + 1
    for index, (one, other) in enumerate(zip(ours[:-1], theirs[:-1], strict=True)):
        assert torch.equal(one, other), index
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    norm = next(child for name, child in decoder.named_children() if name in ("norm", "final_layernorm"))
    torch.testing.assert_close(norm(ours[-1]), theirs[-1], atol=0, rtol=0)


def test_wrapping_changes_nothing(llava: tuple[nn.Module, ModelLayout, dict[str, Tensor]]) -> None:
    model, layout, inputs = llava
    reference = taken(model, layout, inputs)

    def same(other: nn.Module) -> None:
        for one, two in zip(reference, taken(other, layout, inputs), strict=True):
            assert torch.equal(one, two)

    same(torch.compile(model, backend="eager"))  # type: ignore[arg-type]  # a module comes back
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers in the way of older ones
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"]))
    same(adapted)
    checkpointed = copy.deepcopy(model)
    checkpoint_blocks(checkpointed, layout.layers, ExitStack())
    same(checkpointed)


def test_a_compiled_block_is_read_and_stays_compiled(llava: tuple[nn.Module, ModelLayout, dict[str, Tensor]]) -> None:
    model, layout, inputs = llava
    reference = taken(model, layout, inputs)
    block = model.get_submodule(layout.layers[1])
    block.compile(backend="eager")
    with torch.no_grad():
        model(**inputs, use_cache=False)  # compiled before any hook is there: it would not notice one
    for one, two in zip(reference, taken(model, layout, inputs), strict=True):
        assert torch.equal(one, two)
    assert block._compiled_call_impl is not None


def test_hooks_go_when_the_forward_fails(llava: tuple[nn.Module, ModelLayout, dict[str, Tensor]]) -> None:
    model, layout, inputs = llava
    before = num_hooks(model.get_decoder())  # type: ignore[operator]

    def fail(index: int, hidden: Tensor) -> None:
        raise ArithmeticError("broken")

    with pytest.raises(ArithmeticError, match="broken"), block_io(MultimodalModel(model, layout), fail):
        model(**inputs)
    assert num_hooks(model.get_decoder()) == before  # type: ignore[operator]


def test_two_hundred_readings_leave_nothing(llava: tuple[nn.Module, ModelLayout, dict[str, Tensor]]) -> None:
    model, layout, inputs = llava
    first = [weakref.ref(hidden) for hidden in taken(model, layout, inputs)]
    for _ in range(200):
        taken(model, layout, inputs)
    gc.collect()
    assert num_hooks(model.get_decoder()) == 0  # type: ignore[operator]
    assert all(ref() is None for ref in first)


def test_only_the_slices_asked_for(llava: tuple[nn.Module, ModelLayout, dict[str, Tensor]]) -> None:
    model, layout, inputs = llava
    seen: list[int] = []
    with torch.no_grad(), block_io(MultimodalModel(model, layout), lambda index, hidden: seen.append(index), (2, 4)):
        model(**inputs, use_cache=False)
    assert seen == [2, 4]


def test_pooling_is_the_plain_mean_in_float32() -> None:
    """1e-6: the same sums of a few hundred bfloat16 numbers, in another order."""
    hidden = torch.randn(3, 300, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden[1, 250:] = float("nan")  # padding may be undefined
    weights = torch.zeros(3, 2, 300)
    weights[:, 0, 17] = 1
    weights[:, 1, 40:240] = 1 / 200
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pool(hidden, weights)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled[:, 0], hidden[:, 17].float())
    torch.testing.assert_close(pooled[:, 1], hidden[:, 40:240].float().mean(1), atol=1e-6, rtol=1e-6)
