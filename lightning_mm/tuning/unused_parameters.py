"""What of the vision tower and the connector the loss never uses: the one definition for plan, training and skipping.

Data flow: loss of a sample with a picture -> leaves of its autograd graph -> parameters and vision blocks outside it.

A parameter is unused if the autograd graph of the loss does not reach it; a vision block is unused if it stands above
every block that the graph reaches. LLaVA reads its tower below the top (``vision_feature_layer`` -2): the blocks above
would sit in the optimizer, hold up DDP and cost FLOPs for nothing.

The definition is evaluated on two kinds of forward pass. ``fit`` has weights and evaluates it on its own training loss,
with the adapters, packing and precision of the run, once before the optimizer is built (``unused_parameters``) and once
before blocks are skipped (``unused_vision_blocks``). ``plan`` has no weights and evaluates it on meta tensors
(``planning.meta_trace``). Neither computes a gradient: that the graph leads to a parameter is all that is asked, as DDP
asks it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import Forward, replace_forward
from lightning_mm.models.layout import ModelLayout, Region

PICTURE_REGIONS = (Region.VISION, Region.CONNECTOR)


def unused_parameters(mm: MultimodalModel, loss: Callable[[], Tensor]) -> tuple[str, ...]:
    """Names of the trainable tower and connector parameters that ``loss`` does not depend on.

    Args:
        mm: The model after ``apply_plan``.
        loss: Computes the training loss () of a sample with a picture.
    """
    trained = {name: p for name, p in picture_parameters(mm.model, mm.layout).items() if p.requires_grad}
    if not trained:
        return ()
    with torch.random.fork_rng(), no_saved_tensors():
        used = graph_leaves(loss())
    return tuple(name for name, parameter in trained.items() if parameter not in used)


def unused_vision_blocks(model: nn.Module, layout: ModelLayout, used: Collection[Tensor]) -> tuple[str, ...]:
    """Names of the vision blocks above the topmost one that is used, bottom to top.

    Args:
        model: With the floating-point parameters of its vision blocks in the graph.
        layout: Where its blocks are.
        used: ``graph_leaves`` of the loss. Where they hold no vision block at all, the tower runs without gradients,
            the graph says nothing about it, and no block counts as unused.
    """
    in_graph = [
        any(parameter in used for parameter in model.get_submodule(name).parameters()) for name in layout.vision_blocks
    ]
    end = max((index + 1 for index, found in enumerate(in_graph) if found), default=len(in_graph))
    return layout.vision_blocks[end:]


def blocks_read_directly(model: nn.Module, blocks: Sequence[str], loss: Callable[[], Tensor]) -> tuple[str, ...]:
    """Names of the vision blocks whose output is read by more than the next block, bottom to top.

    A LLaVA whose ``vision_feature_layer`` is a list reads several; the topmost of ``blocks`` always counts. Every
    block's output is cut off from the graph below it, so that the graph leads to it only from where it is read.

    Args:
        model: The model.
        blocks: Vision blocks that are computed, bottom to top.
        loss: Computes the loss () of a batch with a picture.
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name in blocks}

    def cut_off(name: str, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
            outputs[name].append(hidden.detach().requires_grad_())
            again = outputs[name][-1].clone()
            return (again, *output[1:]) if isinstance(output, tuple) else again

        return run

    with ExitStack() as undo:
        for name in blocks:
            replace_forward(undo, model.get_submodule(name), partial(cut_off, name))
        with no_saved_tensors():
            used = graph_leaves(loss())
    return tuple(n for n in blocks if n == blocks[-1] or any(output in used for output in outputs[n]))


def picture_parameters(model: nn.Module, layout: ModelLayout) -> dict[str, nn.Parameter]:
    """Parameters of the vision tower and the connector, by name."""
    return {n: p for n, p in model.named_parameters() if layout.location_of(n).region in PICTURE_REGIONS}


def graph_nodes(output: Tensor) -> set[Any]:
    """Every node of the autograd graph of ``output``."""
    nodes: set[Any] = set()
    left = [output.grad_fn] if output.grad_fn is not None else []
    while left:
        node = left.pop()
        if node not in nodes:
            nodes.add(node)
            left += [below for below, _ in node.next_functions if below is not None]
    return nodes


def graph_leaves(output: Tensor) -> set[Tensor]:
    """Tensors that ``output.backward()`` would accumulate gradients into."""
    return {node.variable for node in graph_nodes(output) if hasattr(node, "variable")}


@contextmanager
def no_saved_tensors() -> Iterator[None]:
    """While active, the autograd graph is built and holds no activations; it cannot be run backward."""
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, _refuse_backward):
        yield


@contextmanager
def only_requires_grad(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While active, these parameters of the model require a gradient and all others do not."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def _refuse_backward(_: None) -> Tensor:
    raise AssertionError("this graph was built without saved tensors")
