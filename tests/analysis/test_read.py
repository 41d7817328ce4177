"""read_hidden_states: its values are those of transformers, and the model is left exactly as it was."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.analysis.read import read_hidden_states
from tests.helpers import strangers
from tests.helpers.data import Family

pytestmark = pytest.mark.filterwarnings(
    # Names that transformers below 5.23 has too.
    "ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning",
)
CAPTIONS = (
    "a cat",
    "a small red house with a blue door under a green tree",
    "two birds",
    "the sea at night, very dark",
)


def pictures(folder: Path) -> list[dict[str, Any]]:
    """Pictures of several sizes with captions of several lengths: batches of them are padded."""
    rows = []
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (40 + 12 * number, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        caption = f"{CAPTIONS[number % 4]}, number {number}"
        rows.append({"image": str(folder / f"{number}.png"), "caption": caption, "objects": []})
    return rows


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_values_are_those_of_transformers(name: str, family: Family, tmp_path: Path) -> None:
    """Each row alone, in a chat of one's own, with ``output_hidden_states``; ours are read in padded batches."""
    model, processor = strangers.load(family(name))
    states = read_hidden_states(model, processor, pictures(tmp_path), batch_size=5)
    assert states.probe_set is not None
    assert not states.rejected
    rows = {row.id: row for row in states.probe_set.rows}
    compared = 0
    model.eval()
    for position in ("entailment/last", "picture/last", "picture/image", "text/last"):
        for column, (row_id, _) in enumerate(states.sample_index[position]):
            row = rows[row_id]
            expected = _alone(model, processor, row, position.endswith("image"))
            torch.testing.assert_close(states.features[position][:-1, column], expected[:-1], atol=2e-5, rtol=1e-4)
            if not position.endswith("image"):  # of the last layer, transformers gives what the norm makes of it
                normed = model.get_decoder().norm(states.features[position][-1, column])
                torch.testing.assert_close(normed, expected[-1], atol=2e-4, rtol=1e-3)
            compared += 1
    assert compared > 8 * 4


def _alone(model: Any, processor: Any, row: Any, over_picture: bool) -> Tensor:
    """(T, D) hidden states of one row, at its last token or as the mean over its picture's tokens."""
    said = row.text.replace("<image>", "").strip("\n")
    asked = [{"type": "image"}] * len(row.sample.images) + [{"type": "text", "text": said}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": asked}], add_generation_prompt=True, tokenize=False
    )
    images = [Image.open(path).convert("RGB") for path in row.sample.images] or None
    inputs = processor(text=[text], images=images, return_tensors="pt")
    hidden_TLD = torch.stack(model(**inputs, output_hidden_states=True).hidden_states)[:, 0]
    at = inputs["input_ids"][0] == model.config.image_token_id if over_picture else [-1]
    return hidden_TLD[:, at].mean(1)


class Stop(RuntimeError):
    pass


def in_training(folder: Path, lora: bool) -> tuple[Any, Any]:
    """A model in the middle of a training: modes, gradients, hooks and checkpointing of its owner's choice."""
    model, processor = strangers.load(folder, lora, torch.float64)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    plain = model.get_base_model() if lora else model
    plain.get_encoder(modality="image").eval()
    plain.get_decoder().layers[1].mlp.eval()
    if not lora:
        model.get_input_embeddings().requires_grad_(False)
    model(**{k: v.double() if v.is_floating_point() else v for k, v in _batch(processor).items()}).loss.backward()
    plain.get_decoder().layers[0].register_forward_hook(lambda *_: None)
    return model, processor


def _batch(processor: Any) -> dict[str, Tensor]:
    return strangers.Collate(processor)(strangers.rows(2))


def everything(model: nn.Module, processor: Any) -> dict[str, Any]:
    """All that a reading could change; what cannot be compared by value, by identity."""
    parts = dict(model.named_modules())
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modes": {name: part.training for name, part in parts.items()},
        "attributes": {name: {k: id(v) for k, v in vars(part).items()} for name, part in parts.items()},
        "hooks": {
            f"{name}{kind}": {key: id(hook) for key, hook in getattr(part, kind).items()}
            for name, part in parts.items()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        },
        "checkpointing": {name: getattr(part, "gradient_checkpointing", None) for name, part in parts.items()},
        "tensors": {
            name: (id(t), t.dtype, t.device, t.requires_grad, t._version, t.tolist()) for name, t in tensors.items()
        },
        "gradients": {
            name: None if p.grad is None else (id(p.grad), p.grad.tolist()) for name, p in model.named_parameters()
        },
        "config": (plain.config.to_dict(), plain.generation_config.to_dict()),
        "attention": [part.config._attn_implementation for part in parts.values() if hasattr(part, "config")],
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "torch": (
            torch.is_grad_enabled(),
            torch.is_autocast_cache_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
        ),
        "processor": (processor.tokenizer.padding_side, processor.tokenizer.pad_token, processor.to_dict()),
    }


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "adapters"])
def test_the_model_is_left_as_it_was(lora: bool, family: Family, tmp_path: Path) -> None:
    model, processor = in_training(family("llava"), lora)
    before = everything(model, processor)
    states = read_hidden_states(model, processor, pictures(tmp_path))
    assert isinstance(states, HiddenStates)
    after = everything(model, processor)
    assert not [name for name in before if before[name] != after[name]]


def test_the_model_is_left_as_it_was_by_a_reading_that_fails(family: Family, tmp_path: Path) -> None:
    model, processor = in_training(family("llava"), lora=False)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(random.random() + np.random.rand() + float(torch.rand(())))
        if len(calls) == 2:
            raise Stop

    model.get_decoder().layers[2].register_forward_hook(fail)
    before = everything(model, processor)
    with pytest.raises(Stop):
        read_hidden_states(model, processor, pictures(tmp_path), batch_size=4)
    after = everything(model, processor)
    assert len(calls) == 2
    assert not [name for name in before if before[name] != after[name]]
