"""Reversible changes of a model's modules: hooks on blocks, and replaced forward passes.

Data flow: decoder blocks -> ``block_io`` -> ``receive(slice, hidden states)``. Slice 0 is what enters the first block
(the embeddings, image features put in); slice i + 1 is what block i returns, before the final norm.
``replace_forward`` is the one place where a module's forward is assigned; what undoes it goes onto an ``ExitStack``,
so that several changes come off in reverse order.

Shapes: B rows, L tokens, N hidden states, D hidden size, V vocabulary.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.models.handle import MultimodalModel

Forward = Callable[..., Any]

Receive = Callable[[int, Tensor], None]
"""Takes the index of a slice and its hidden states (B, L, D)."""


def replace_forward(undo: ExitStack, module: nn.Module, make: Callable[[Forward], Forward]) -> None:
    """Replace a module's forward, until ``undo`` is closed.

    Args:
        undo: Gets the callback that restores the module's forward.
        module: Any module.
        make: Takes the module's current forward and returns the one to run instead.
    """
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

    module.__dict__["forward"] = make(module.forward)
    undo.callback(restore)


@contextmanager
def plain_forwards(model: nn.Module) -> Iterator[None]:
    """While active, every module runs the forward of its class: whatever ``replace_forward`` put in is left out."""
    replaced = {module: module.__dict__.pop("forward") for module in model.modules() if "forward" in module.__dict__}
    try:
        yield
    finally:
        for module, forward in replaced.items():
            module.__dict__["forward"] = forward


def skip_blocks(undo: ExitStack, blocks: Iterable[nn.Module], in_tuple: bool) -> None:
    """Make blocks return their input hidden states, until ``undo`` is closed.

    Args:
        undo: Gets the callbacks that restore the blocks.
        blocks: Decoder or vision blocks.
        in_tuple: Whether their output is a tuple that begins with the hidden states.
    """

    def unchanged(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if in_tuple else hidden

    for block in blocks:
        replace_forward(undo, block, lambda _: unchanged)


@contextmanager
def skipped(blocks: Iterable[nn.Module], in_tuple: bool) -> Iterator[None]:
    """While active, blocks return their input hidden states; see ``skip_blocks``."""
    with ExitStack() as undo:
        skip_blocks(undo, blocks, in_tuple)
        yield


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
def block_io(mm: MultimodalModel, receive: Receive, slices: Collection[int] | None = None) -> Iterator[None]:
    """While active, every forward pass of the model hands over its hidden states.

    Blocks that were compiled run uncompiled meanwhile. No hook is left behind, also where the forward pass fails.

    Args:
        mm: The plain model, as ``unwrap_model`` gives it.
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
    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
        receive(index, output if isinstance(output, Tensor) else output[0])

    return hook


@torch.no_grad()
def read_out(mm: MultimodalModel, hidden: Tensor, tuples: Mapping[int, bool], chunk: int = 256) -> Tensor:
    """Logits of hidden states (the logit lens, where they come from inner blocks).

    Args:
        mm: The plain model.
        hidden: (N, D) before the final norm.
        tuples: Which blocks return tuples, as an ``ActivationCache`` knows.
        chunk: Hidden states at a time; the vocabulary is large.

    Returns:
        (N, V) float32.
    """
    return torch.cat([logits_of(mm, part, tuples) for part in hidden.split(chunk)])


def logits_of(mm: MultimodalModel, hidden_ND: Tensor, tuples: Mapping[int, bool]) -> Tensor:
    """(N, V) float32 logits as ``read_out`` gives them, with their graph where gradients are on."""
    hidden_N1D = hidden_ND[:, None]
    # Any token id will do, since its embedding is skipped, too; some models (Gemma 4) need the id itself.
    token_id = int(getattr(mm.model.config, "image_token_id", None) == 0)
    given = {"input_ids": torch.full((len(hidden_ND), 1), token_id, device=hidden_ND.device)}
    if "position_ids" in inspect.signature(mm.model.forward).parameters:
        # No block reads them; without them a model may reuse those of its last batch (Qwen2-VL's rope_deltas).
        given["position_ids"] = torch.zeros(len(hidden_ND), 1, dtype=torch.long, device=hidden_ND.device)
    with _decoder_returning(mm, hidden_N1D, tuples):
        logits = mm.model(use_cache=False, **given).logits
    return logits[:, -1].float()


@contextmanager
def _decoder_returning(mm: MultimodalModel, output: Tensor, tuples: Mapping[int, bool]) -> Iterator[None]:
    """While active, the decoder blocks compute nothing and the last one returns ``output``."""
    with ExitStack() as undo:
        for index, name in enumerate(mm.layout.layers):
            block = mm.model.get_submodule(name)
            replace_forward(undo, block, partial(_constant_forward, (output,) if tuples.get(index) else output))
        yield


def _constant_forward(answer: Any, _: Forward) -> Forward:
    return lambda *_, **__: answer


def remove_input_gradient_hooks(model: Any) -> int:
    """Take off hooks that make embeddings require gradients; returns how many there were."""
    hooks = list(getattr(model, "_require_grads_hooks", []) or [])
    if hooks:
        model.disable_input_require_grads()
    return len(hooks)
