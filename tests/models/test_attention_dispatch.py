"""The attention functions of one model are exchanged for that model alone, and put back."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_mm.models.attention.dispatch import (
    AttentionFunction,
    Lookup,
    attention_modules,
    change_attention,
    has_eager_attention,
    looks_up_attention,
    write_out_masks,
)
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone, load_model

Family = Callable[[str], Path]


def loaded(family: Family, name: str) -> MultimodalModel:
    return MultimodalModel.of(load_model(Backbone(path=str(family(name)))))


def counting(calls: list[str], label: str) -> Callable[[str, AttentionFunction, Lookup], AttentionFunction]:
    """A change that notes each call and computes what was computed before."""

    def change(name: str, attend: AttentionFunction, _: Lookup) -> AttentionFunction:
        def run(*args: Any, **options: Any) -> Any:
            calls.append(f"{label} {name}")
            return attend(*args, **options)

        return run

    return change


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "internvl", "gemma3", "mllama"])
def test_every_attention_of_the_decoder_can_be_exchanged(name: str, family: Family) -> None:
    """The lookup in ``forward`` is no public interface of transformers: this test says where it has changed."""
    mm = loaded(family, name)
    mixers = [mm.model.get_submodule(block.attention) for block in mm.layout.blocks if block.attention]
    assert mixers
    assert all(looks_up_attention(mixer) and has_eager_attention(mixer) for mixer in mixers)
    assert not looks_up_attention(mm.head)


def test_one_model_is_changed_and_no_other(family: Family) -> None:
    """Same class, same process: the other model, the registries and the classes are as they were."""
    mm, other = loaded(family, "llava"), loaded(family, "llava")
    inputs = {"input_ids": torch.arange(6)[None] + 5}
    registered = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    classes = {type(module): type(module).forward for module in attention_modules(mm.model)}
    expected = mm.model(**inputs).logits
    calls: list[str] = []
    undo = ExitStack()
    change_attention(undo, attention_modules(mm.model), counting(calls, "ours"))
    assert torch.equal(mm.model(**inputs).logits, expected)
    assert calls == ["ours sdpa"] * mm.layout.num_layers
    assert torch.equal(other.model(**inputs).logits, expected)
    assert len(calls) == mm.layout.num_layers
    assert (dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)) == registered
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
    assert all(kind.forward is own for kind, own in classes.items())
    undo.close()
    assert not any("forward" in module.__dict__ for module in mm.model.modules())
    assert torch.equal(mm.model(**inputs).logits, expected)
    assert len(calls) == mm.layout.num_layers


def test_what_came_first_stays_inside(family: Family) -> None:
    mm = loaded(family, "llava")
    calls: list[str] = []
    undo = ExitStack()
    for label in ("inner", "outer"):
        change_attention(undo, attention_modules(mm.model), counting(calls, label))
    mm.model(input_ids=torch.arange(6)[None] + 5)
    assert calls == ["outer sdpa", "inner sdpa"] * mm.layout.num_layers
    undo.close()
    assert not any("forward" in module.__dict__ for module in mm.model.modules())


def test_written_out_masks_are_taken_off(family: Family) -> None:
    mm = loaded(family, "gemma3")
    config: Any = mm.model.get_submodule(mm.layout.blocks[0].attention or "").config
    kernel = config._attn_implementation
    with ExitStack() as undo:
        write_out_masks(undo, [config])
        assert config._attn_implementation == "eager"
    assert config._attn_implementation == kernel == "sdpa"
