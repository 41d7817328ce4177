"""What the model would say of any hidden state: its own final norm, head, soft-capping and scaling, whatever they are.

Data flow: hidden states as a block puts them out -> the model's forward pass with all blocks passed by -> logits.

Shapes: N hidden states, D hidden size, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.models.anatomy import Anatomy


@torch.no_grad()
def read_out(model: Any, anatomy: Anatomy, hidden: Tensor, tuples: Mapping[int, bool], chunk: int = 256) -> Tensor:
    """Logits of hidden states (the logit lens, where they come from inner blocks).

    Args:
        model: The plain model.
        anatomy: Of it.
        hidden: (N, D) before the final norm.
        tuples: Which blocks return tuples, as a ``Recording`` knows.
        chunk: Hidden states at a time; the vocabulary is large.

    Returns:
        (N, V) float32.
    """
    return torch.cat([logits_of(model, anatomy, part, tuples) for part in hidden.split(chunk)])


def logits_of(model: Any, anatomy: Anatomy, hidden_ND: Tensor, tuples: Mapping[int, bool]) -> Tensor:
    """(N, V) float32 logits as ``read_out`` gives them, with their graph where gradients are on."""
    hidden_N1D = hidden_ND[:, None]
    # Any word will do, for its embedding is passed by too; some models (Gemma 4) want to know which word it was.
    word = int(getattr(model.config, "image_token_id", None) == 0)
    given = {"input_ids": torch.full((len(hidden_ND), 1), word, device=hidden_ND.device)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        # No block reads them; a model left to itself takes those of its last batch (Qwen2-VL's rope_deltas).
        given["position_ids"] = torch.zeros(len(hidden_ND), 1, dtype=torch.long, device=hidden_ND.device)
    with passed_by(model, anatomy, hidden_N1D, tuples):
        logits = model(use_cache=False, **given).logits
    return logits[:, -1].float()


@contextmanager
def passed_by(model: nn.Module, anatomy: Anatomy, output: Tensor, tuples: Mapping[int, bool]) -> Iterator[None]:
    """While active, the blocks compute nothing and the last one returns ``output``."""
    blocks = [model.get_submodule(name) for name in anatomy.layers]
    with restored(blocks):
        for index, block in enumerate(blocks):
            answer = (output,) if tuples.get(index) else output
            block.forward = lambda *_, answer=answer, **__: answer
        yield


@contextmanager
def restored(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Whatever these blocks' forward becomes while this is active, it is put back."""
    held = [block.__dict__.get("forward") for block in blocks]
    try:
        yield
    finally:
        for block, own in zip(blocks, held, strict=True):
            if own is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = own
