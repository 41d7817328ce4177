"""What the proof of a split finds at the replaced tensors, in float32 and under autocast, and what it lets pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch
from lightning_mm.data.collator import Collator
from lightning_mm.data.readers.conversations import read_conversations
from lightning_mm.execution.cache import vision_features
from lightning_mm.execution.cache.activation_cache import split_verified_prefix
from lightning_mm.execution.cache.proof import relative_gap, rounding_bound, structure_gap
from lightning_mm.execution.cache.vision_features import FrozenTower, split_verified_tower
from lightning_mm.models.loading import Backbone
from lightning_mm.models.processor import load_processor
from lightning_mm.tuning import ConnectorOnly, IntermediateOnly, TuningPolicy
from lightning_mm.tuning.apply import prepare_model
from tests.helpers.data import Family, make_uneven_rows
from tests.helpers.feature_layers import convolutional, with_experts

PRECISIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float32": nullcontext,
    "bf16-mixed": lambda: torch.autocast("cpu", torch.bfloat16),
}
precisions = pytest.mark.parametrize("precision", PRECISIONS)
DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe")
"""Add states of the tower's first two blocks to what leaves the decoder's first two."""


@pytest.fixture(scope="module")
def model(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Also a mixture of experts with DeepStack, and a tower of convolutions."""
    made = {"qwen3_vl_moe": ("qwen3_vl", with_experts), "fast_vlm": ("llava", convolutional)}

    @cache
    def folder(name: str) -> Path:
        if name not in made:
            return family(name)
        base, variant = made[name]
        return variant(family(base), tmp_path_factory.mktemp("variant") / name)

    return folder


@pytest.fixture
def prepared(model: Family, tmp_path: Path) -> Callable[..., tuple[Any, Any, Batch, Collator]]:
    def prepare(name: str, tuning: TuningPolicy) -> tuple[Any, Any, Batch, Collator]:
        collator = Collator(load_processor(str(model(name))))
        batch = collator(read_conversations(make_uneven_rows(tmp_path)).samples[:3])
        return *prepare_model(Backbone(path=str(model(name))), tuning), batch, collator

    return prepare


@precisions
@pytest.mark.parametrize("name", [*DEEPSTACK, "fast_vlm"])
def test_known_features_give_the_whole_models_logits(name: str, precision: str, prepared: Any) -> None:
    """Bit for bit with the features of the batch; those of the rows alone may differ by their rounding."""
    mm, _, batch, collator = prepared(name, ConnectorOnly())
    with PRECISIONS[precision](), torch.no_grad():
        tower = split_verified_tower(mm, (), batch, collator)
        assert len(tower.read) == (3 if name in DEEPSTACK else 1)
        whole = mm.model(**batch.inputs).logits
        grey = collator.collate_valid(batch.samples, [], blank_images=True).inputs
        together = tower.states(batch)
        with tower.starting_from([together]):
            assert torch.equal(mm.model(**grey).logits, whole)
        states = [tower.states(collator([sample])) for sample in batch.samples]
        bound = rounding_bound(together.dtype, "cpu", 1024, len(mm.layout.vision_blocks))
        assert relative_gap(together, torch.cat(states, 0)) <= bound
        with tower.starting_from([states[1], states[0], states[2]]):
            assert not torch.allclose(mm.model(**grey).logits, whole), "features decide the logits"


@precisions
@pytest.mark.parametrize("name", DEEPSTACK)
def test_a_block_that_is_read_and_not_kept(
    name: str, precision: str, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the summed loss, DeepStack of a tiny model is less than a thousandth."""
    mm, _, batch, collator = prepared(name, ConnectorOnly())
    monkeypatch.setattr(vision_features, "blocks_read_directly", lambda _, blocks, __: blocks[-1:])
    with PRECISIONS[precision](), pytest.raises(UserError, match="What leaves the decoder is lost"):
        split_verified_tower(mm, (), batch, collator)


@precisions
@pytest.mark.parametrize(
    ("name", "why"), [(DEEPSTACK[0], "differs by"), (DEEPSTACK[1], "differs by"), ("mllama", "is lost")]
)
def test_pictures_that_enter_above_the_prefix(name: str, why: str, precision: str, prepared: Any) -> None:
    mm, plan, batch, collator = prepared(name, IntermediateOnly(layers="1"))
    why = "is lost" if name == "mllama" else "differs by"
    with PRECISIONS[precision](), pytest.raises(UserError, match=f"What leaves the last block {why}"):
        split_verified_prefix(mm, plan, batch, collator)


@precisions
@pytest.mark.parametrize("part", ["tower", "prefix"])
def test_rows_that_see_each_other(part: str, precision: str, prepared: Any) -> None:
    """A tenth of the mean over the batch: more than any order of sums."""
    mm, plan, batch, collator = prepared("llava", ConnectorOnly() if part == "tower" else IntermediateOnly(layers="2"))
    name = mm.layout.vision_blocks[0] if part == "tower" else mm.layout.layers[0]

    def mixed(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + 0.1 * output.mean(0, keepdim=True)

    mm.model.get_submodule(name).register_forward_hook(mixed)
    split = partial(split_verified_tower, mm, ()) if part == "tower" else partial(split_verified_prefix, mm, plan)
    why = "with those beside it" if part == "tower" else "if a row is computed alone"
    with PRECISIONS[precision](), pytest.raises(UserError, match=why):
        split(batch, collator)


def test_blocks_of_several_shapes(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mm, _, batch, collator = prepared("fast_vlm", ConnectorOnly())
    monkeypatch.setattr(vision_features, "blocks_read_directly", lambda _, blocks, __: tuple(blocks))
    with pytest.raises(UserError, match=r"put out \(3, 8, 14, 14\) and \(3, 16, 7, 7\) and \(3, 24, 4, 4\)"):
        split_verified_tower(mm, (), batch, collator)


def test_features_of_other_images_are_refused(prepared: Any) -> None:
    for name in ("fast_vlm", "llava"):
        mm, _, batch, collator = prepared(name, ConnectorOnly())
        tower: FrozenTower = split_verified_tower(mm, (), batch, collator)
        states = [tower.states(collator([sample])) for sample in batch.samples]
        with pytest.raises(UserError, match="Features of shape"), tower.starting_from(states[:2]):
            mm.model(**batch.inputs)


@pytest.mark.parametrize(("dtype", "depth"), [(torch.bfloat16, 4), (torch.bfloat16, 24), (torch.float32, 24)])
def test_the_bound_is_that_of_rounding(dtype: torch.dtype, depth: int) -> None:
    """Residual blocks in float64 are the reference: they are nearer than the bound, and not 100 times nearer."""
    generator = torch.Generator().manual_seed(0)
    width = 256
    weights = torch.randn(depth, width, width, generator=generator, dtype=torch.float64) / width**0.5
    inputs = torch.randn(50, width, generator=generator).to(dtype)

    def run(stream: Tensor) -> Tensor:
        for weight in weights:
            normed = nn.functional.layer_norm(stream, (width,))
            stream = stream + nn.functional.gelu(normed @ weight.to(stream.dtype))
        return stream

    exact = run(inputs.double())
    gap = float((run(inputs).double() - exact).norm() / exact.norm())
    bound = rounding_bound(dtype, "cpu", width, depth)
    assert bound / 100 < gap < bound


def test_a_gap_counts_beyond_what_the_model_repeats() -> None:
    whole = torch.ones(4)
    assert structure_gap(whole, whole, whole) == 0
    assert structure_gap(whole, whole, whole + 2**-20) > 0
    assert structure_gap(whole, whole + 2**-20, whole - 2**-20) == 0
    assert not structure_gap(whole, whole, whole * torch.nan) <= 1e9
