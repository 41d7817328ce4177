"""Parts of decoder blocks: named as their modelling files have them, and doing what their name says."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mm.models.block_parts import BlockPart, parameters_by_part
from lightning_mm.models.layout import ModelLayout
from tests.helpers.mixtures import MODELS, WIDTH, build

ATTENTION = {"attention": "self_attn"}
MIXTURE = {"experts": "mlp.experts", "router": "mlp.gate"}
SHARED = {"shared_experts": "mlp.shared_experts"}
PARTS: dict[str, list[dict[str, str]]] = {
    "qwen3_vl_moe": [ATTENTION | MIXTURE] * 2,
    "qwen3_5_moe": [
        {"mixer": "linear_attn"} | MIXTURE | {"shared_experts": "mlp.shared_expert"},
        ATTENTION | MIXTURE | {"shared_experts": "mlp.shared_expert"},
    ],
    "glm4v_moe": [ATTENTION | {"mlp": "mlp"}, ATTENTION | MIXTURE | SHARED],
    "llama4": [
        ATTENTION | {"mlp": "feed_forward"},
        ATTENTION
        | {
            "experts": "feed_forward.experts",
            "router": "feed_forward.router",
            "shared_experts": "feed_forward.shared_expert",
        },
    ],
    "ernie4_5_vl_moe": [
        ATTENTION | {"mlp": "mlp"},
        ATTENTION | SHARED | {"experts": "mlp.*_moe.experts", "router": "mlp.*_moe.gate"},
    ],
    "internvl": [ATTENTION | MIXTURE] * 2,
    "lfm2_vl": [{"mixer": "conv", "mlp": "feed_forward"}, ATTENTION | {"mlp": "feed_forward"}],
}
"""Where each part of each block is, as read from the modelling files of transformers; norms are found apart."""

built = cache(build)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_the_part_that_the_modelling_file_puts_it(name: str) -> None:
    model = built(name)
    layout = ModelLayout.of(model)
    for index, block in enumerate(layout.layers):
        expected, owners = PARTS[name][index], dict(model.get_submodule(block).named_modules())
        for parameter, place in layout.locations.items():
            if not parameter.startswith(f"{block}."):
                continue
            path = parameter.removeprefix(f"{block}.")
            is_norm = "norm" in path.split(".")[-2] and owners[path.rpartition(".")[0]].weight.ndim == 1
            assert (place.part is BlockPart.NORM) == is_norm, path
            if not is_norm:
                assert Path(path).match(f"{expected[str(place.part)]}*"), (path, place.part)
        found = {str(place.part) for place in layout.locations.values() if place.layer == index}
        assert found == expected.keys() | {"norm"}


@pytest.mark.parametrize("name", MODELS)
def test_mixers_mix_tokens_and_feed_forwards_are_added_to_the_stream(name: str) -> None:
    """What stands before the last token changes what attention puts out at it, and nothing of the feed-forward's.

    1e-5: the same float32 products, in groups of other sizes; attention moves by more than 100 times as much.
    """
    model = copy.deepcopy(built(name))
    ids = torch.arange(10, 20)[None]
    for block in ModelLayout.of(model).blocks:
        assert block.attention is not None
        assert block.mlp is not None
        mixer, feed_forward = model.get_submodule(block.attention), model.get_submodule(block.mlp)
        assert moved_last_token(model, ids, mixer) > 1e-3, block
        assert moved_last_token(model, ids, feed_forward) < 1e-5, block
        outputs: list[Tensor] = []
        whole = block_output(model, ids, block.name, feed_forward, outputs.append)
        without = block_output(model, ids, block.name, feed_forward, None)
        added = outputs[0].reshape(1, -1, WIDTH)
        torch.testing.assert_close(whole - without, added, atol=1e-5, rtol=1e-5)
        assert added.abs().max() > 1e-3


@torch.no_grad()
def moved_last_token(model: nn.Module, ids: Tensor, module: nn.Module) -> float:
    """How far a module's output at the last token moves if its input at the token before does."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    model(input_ids=ids, use_cache=False)
    handle.remove()
    args, kwargs = calls[0]
    states = args[0] if args else kwargs["hidden_states"]
    changed = states.clone()
    changed.reshape(-1, WIDTH)[-2] += 1.0
    again = (changed, *args[1:]) if args else args
    outputs = [module(*args, **kwargs), module(*again, **kwargs if args else {**kwargs, "hidden_states": changed})]
    first, second = (o if isinstance(o, Tensor) else o[0] for o in outputs)
    return float((first - second).reshape(-1, WIDTH)[-1].abs().max())


@torch.no_grad()
def block_output(
    model: nn.Module, ids: Tensor, block: str, part: nn.Module, receive: Callable[[Tensor], None] | None
) -> Tensor:
    """The output of a block, whose part is heard by ``receive`` or, without it, puts out zero."""
    outputs: list[Tensor] = []

    def heard(_: nn.Module, __: Any, output: Any) -> Any:
        value = output if isinstance(output, Tensor) else output[0]
        if receive is not None:
            receive(value)
            return None
        return torch.zeros_like(value) if isinstance(output, Tensor) else (torch.zeros_like(value), *output[1:])

    handles = [
        part.register_forward_hook(heard),
        model.get_submodule(block).register_forward_hook(
            lambda _, __, output: outputs.append(output if isinstance(output, Tensor) else output[0])
        ),
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs[0]


class _Pieces(nn.Module):
    """A block whose MLP is in two pieces and whose class names mislead."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_scale = nn.Linear(WIDTH, 3)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.self_attn = _MoeMlpAttention()
        self.gate = nn.Parameter(torch.zeros(1))


class _MoeMlpAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.out((query @ key.mT).softmax(-1) @ value)  # type: ignore[no-any-return]


def test_words_in_class_names_tell_nothing() -> None:
    block = _Pieces()
    names = {id(p): n for n, p in block.named_parameters()}
    parts = {names[id(parameter)].partition(".")[0]: str(part) for part, parameter in parameters_by_part(block, WIDTH)}
    assert parts == {"attn_scale": "other", "fc1": "mlp", "fc2": "mlp", "self_attn": "attention", "gate": "norm"}
