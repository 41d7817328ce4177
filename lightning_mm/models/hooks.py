"""Hooks on the decoder's blocks of a live module, for the length of one forward pass.

Data flow: decoder blocks -> ``tapped`` -> ``receive(slice, hidden states)``. Slice 0 is what enters the first block
(the embeddings, pictures put in); slice i + 1 is what block i returns, before the final norm.

What the model would say of any hidden state: its own final norm, head, soft-capping and scaling, whatever they are.

Data flow: hidden states as a block puts them out -> the model's forward pass with all blocks passed by -> logits.

Shapes: N hidden states, D hidden size, V vocabulary.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.models.handle import MultimodalModel

Receive = Callable[[int, Tensor], None]


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """While active, modules that were compiled run uncompiled: a compiled one may not notice new hooks."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, implementation in compiled.items():
            module._compiled_call_impl = implementation


@contextmanager
def tapped(mm: MultimodalModel, receive: Receive, slices: Collection[int] | None = None) -> Iterator[None]:
    """While active, every forward pass of the model hands over its hidden states.

    Blocks that were compiled run uncompiled meanwhile. No hook is left behind, also where the forward pass fails.

    Args:
        mm: As ``plain`` gives it.
        receive: Called with the slice and its hidden states (B, L, D), once per forward pass and slice.
        slices: Which of the ``num_layers + 1`` slices; all if None.
    """
    wanted = set(range(mm.layout.num_layers + 1) if slices is None else slices)
    handles = []
    try:
        with uncompiled(mm.model):
            for index, name in enumerate(mm.layout.layers):
                block = mm.model.get_submodule(name)
                if index == 0 and 0 in wanted:
                    handles.append(block.register_forward_pre_hook(_entering(receive), with_kwargs=True))
                if index + 1 in wanted:
                    handles.append(block.register_forward_hook(_leaving(receive, index + 1)))
            yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(receive: Receive) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        receive(0, args[0] if args else kwargs["hidden_states"])

    return hook


def _leaving(receive: Receive, index: int) -> Callable[..., None]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        receive(index, output if isinstance(output, Tensor) else output[0])

    return hook


@torch.no_grad()
def read_out(mm: MultimodalModel, hidden: Tensor, tuples: Mapping[int, bool], chunk: int = 256) -> Tensor:
    """Logits of hidden states (the logit lens, where they come from inner blocks).

    Args:
        mm: The plain model.
        hidden: (N, D) before the final norm.
        tuples: Which blocks return tuples, as a ``Recording`` knows.
        chunk: Hidden states at a time; the vocabulary is large.

    Returns:
        (N, V) float32.
    """
    return torch.cat([logits_of(mm, part, tuples) for part in hidden.split(chunk)])


def logits_of(mm: MultimodalModel, hidden_ND: Tensor, tuples: Mapping[int, bool]) -> Tensor:
    """(N, V) float32 logits as ``read_out`` gives them, with their graph where gradients are on."""
    hidden_N1D = hidden_ND[:, None]
    # Any word will do, for its embedding is passed by too; some models (Gemma 4) want to know which word it was.
    word = int(getattr(mm.model.config, "image_token_id", None) == 0)
    given = {"input_ids": torch.full((len(hidden_ND), 1), word, device=hidden_ND.device)}
    if "position_ids" in inspect.signature(mm.model.forward).parameters:
        # No block reads them; a model left to itself takes those of its last batch (Qwen2-VL's rope_deltas).
        given["position_ids"] = torch.zeros(len(hidden_ND), 1, dtype=torch.long, device=hidden_ND.device)
    with passed_by(mm, hidden_N1D, tuples):
        logits = mm.model(use_cache=False, **given).logits
    return logits[:, -1].float()


@contextmanager
def passed_by(mm: MultimodalModel, output: Tensor, tuples: Mapping[int, bool]) -> Iterator[None]:
    """While active, the blocks compute nothing and the last one returns ``output``."""
    blocks = [mm.model.get_submodule(name) for name in mm.layout.layers]
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


def remove_input_gradient_hooks(model: Any) -> int:
    """Take off hooks that make embeddings require gradients; returns how many there were."""
    hooks = list(getattr(model, "_require_grads_hooks", []) or [])
    if hooks:
        model.disable_input_require_grads()
    return len(hooks)
