"""The parts of one decoder block, by what they compute and, where that does not tell, by the name of the child.

Data flow: a decoder block, on any device, and the width of the residual stream -> a ``BlockPart`` for every parameter.

The rules, in order. A mixture of experts is a module with expert weights (3-D parameters, or a list of equal MLPs) and
a router, which writes one value per expert. Attention calls transformers' attention interface, or a softmax or
``scaled_dot_product_attention`` of its own. What else mixes tokens (it holds a convolution along them, or is named
after attention) is a mixer. What maps the residual stream to the residual stream and mixes nothing is an MLP; if a
child is named so, only that one. A norm is a module named so, without a matrix on the stream. The rest is ``other``.
The name of a class tells norms only: ``Qwen3VLMoeTextAttention`` is no mixture.

Shapes: D hidden size, F inner size of an MLP, E experts.
"""

import inspect
from collections.abc import Iterator, Mapping
from enum import StrEnum

from torch import nn

ATTENTION_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
"""Global through which attention modules of transformers look their attention function up."""


class BlockPart(StrEnum):
    """The parts of one decoder block."""

    ATTENTION = "attention"
    MLP = "mlp"
    NORM = "norm"
    MIXER = "mixer"
    """Mixes tokens by other means than attention: convolutions, recurrences."""
    EXPERTS = "experts"
    SHARED_EXPERTS = "shared_experts"
    """Beside routed experts; every token passes through them."""
    ROUTER = "router"
    INDEXER = "indexer"
    """Selects the keys that sparse attention reads."""
    OTHER = "other"
    """Residual gates and other weights that are none of these."""


FEED_FORWARD_PARTS = (BlockPart.MLP, BlockPart.EXPERTS, BlockPart.SHARED_EXPERTS, BlockPart.ROUTER)
"""Parts that a mixture of experts has where a dense block has its MLP."""

_OWN_ATTENTION = {"softmax", "Softmax", "scaled_dot_product_attention", "multi_head_attention_forward"}
_ATTENTION_WORDS = ("attn", "attention")
_MLP_WORDS = ("mlp", "ffn", "feed_forward", "feedforward", "moe")
_ROUTER_NAMES = ("gate", "router")


def parameters_by_part(block: nn.Module, width: int) -> Iterator[tuple[BlockPart, nn.Parameter]]:
    """Each parameter of a block with its part.

    Args:
        block: A decoder block, with or without adapters; may be on the meta device.
        width: D, the width of the residual stream.
    """
    parts = {**_mixture_parts(block, width)}
    parts |= _child_parts(block, width, parts) | _indexers(block)
    for path, module in block.named_modules():
        part = _enclosing_part(path, parts)
        if _is_norm(path, module, width):
            part = BlockPart.NORM
        for parameter in module.parameters(recurse=False):
            # Gates of the block's own (Mllama) are vectors on its stream, as norms are.
            yield (BlockPart.NORM if module is block and parameter.ndim < 2 else part), parameter


def _enclosing_part(path: str, parts: Mapping[str, BlockPart]) -> BlockPart:
    while path and path not in parts:
        path = path.rpartition(".")[0]
    return parts.get(path, BlockPart.OTHER)


def _is_norm(path: str, module: nn.Module, width: int) -> bool:
    named = "norm" in type(module).__name__.lower() or "norm" in path.rpartition(".")[2]
    matrices = (p for p in module.parameters(recurse=False) if p.ndim > 1)
    return named and not any(width in p.shape for p in matrices) and not isinstance(module, nn.Linear)


def _mixture_parts(block: nn.Module, width: int) -> dict[str, BlockPart]:
    """Paths of experts, routers and shared experts; empty for a block without a mixture."""
    parts: dict[str, BlockPart] = {}
    for path, module in block.named_modules():
        number = 0 if "shared" in path else _number_of_experts(module, width)
        path = path.removesuffix(".base_layer").removesuffix(".base_layer")  # of adapters
        found = _routers(block, path, number) if number > 1 else {}
        if found:
            parts |= {path: BlockPart.EXPERTS, **found}
    if not parts:
        return {}
    inside = [path.rpartition(".")[0] for path in parts]
    for path, module in block.named_modules():
        beside = path.rpartition(".")[0] in inside and "." in path and path not in parts
        whole = beside and not any(each.startswith(f"{path}.") for each in parts) and _maps_stream(module, width)
        if path and ("shared" in path.rpartition(".")[2] or whole):
            parts[path] = BlockPart.SHARED_EXPERTS
    return parts


def _number_of_experts(module: nn.Module, width: int) -> int:
    """E, if a module holds the weights of experts; else 0."""
    if isinstance(module, nn.ModuleList):
        alike = len({type(each) for each in module}) == 1 and all(_maps_stream(each, width) for each in module)
        return len(module) if alike else 0
    if isinstance(module, nn.modules.conv._ConvNd):
        return 0
    return max((len(p) for p in module.parameters(recurse=False) if p.ndim == 3), default=0)


def _routers(block: nn.Module, experts: str, number: int) -> dict[str, BlockPart]:
    """Path of the module nearest to some experts that writes one value for each; empty if there is none."""
    scope = experts.rpartition(".")[0]
    while True:
        for name, child in block.get_submodule(scope).named_children():
            path = f"{scope}.{name}" if scope else name
            rows = [written for _, written in _matrices(child)]
            named = name in _ROUTER_NAMES and max(rows, default=0) >= number
            if "shared" not in name and (named or (rows and set(rows) == {number})):
                return {path: BlockPart.ROUTER}
        if not scope:
            return {}
        scope = scope.rpartition(".")[0]


def _child_parts(block: nn.Module, width: int, mixture: Mapping[str, BlockPart]) -> dict[str, BlockPart]:
    """Parts of the block's children that are not in a mixture."""
    parts: dict[str, BlockPart] = {}
    loose: dict[str, nn.Module] = {}
    for name, child in block.named_children():
        if name in mixture:
            continue
        if any(path.startswith(f"{name}.") for path in mixture):
            parts[name] = BlockPart.MLP  # what of a mixture is none of its parts, such as projections around it
        elif _mentions(child, {ATTENTION_REGISTRY}):
            parts[name] = BlockPart.ATTENTION
        elif _maps_stream(child, width):
            mixes = any(isinstance(m, nn.Conv1d) for m in child.modules()) or _has_word(name, _ATTENTION_WORDS)
            parts[name] = BlockPart.MIXER if mixes else BlockPart.MLP
            if _mentions(child, _OWN_ATTENTION):
                parts[name] = BlockPart.ATTENTION
        elif any(_matrices(child)) and not _is_norm(name, child, width):
            loose[name] = child
    mlps = [name for name, part in parts.items() if part is BlockPart.MLP]
    if named := [name for name in mlps if _has_word(name, _MLP_WORDS)]:
        parts |= {name: BlockPart.OTHER for name in mlps if name not in named}
    elif not mlps and not mixture:
        parts |= dict.fromkeys(_pieces_of_mlp(loose, width), BlockPart.MLP)
    return parts


def _pieces_of_mlp(children: Mapping[str, nn.Module], width: int) -> list[str]:
    """Names of the children that together are an MLP, such as fc1 (D, F) and fc2 (F, D)."""
    widths = {name: set(_matrices(child)) for name, child in children.items()}
    every = set().union(*widths.values())
    return [n for n, pairs in widths.items() if any(width in p and p[::-1] in every for p in pairs)]


def _indexers(block: nn.Module) -> dict[str, BlockPart]:
    return {path: BlockPart.INDEXER for path, _ in block.named_modules() if "indexer" in path.rpartition(".")[2]}


def _has_word(name: str, words: tuple[str, ...]) -> bool:
    return any(word in name.lower() for word in words)


def _matrices(module: nn.Module) -> Iterator[tuple[int, int]]:
    """(read, written) widths of each matrix; quantized weights are packed, so that linear modules are asked."""
    for each in module.modules():
        if isinstance(each, nn.Linear):
            yield each.in_features, each.out_features
        elif not isinstance(each, nn.modules.conv._ConvNd):
            yield from ((p.shape[1], p.shape[0]) for p in each.parameters(recurse=False) if p.ndim == 2)


def _maps_stream(module: nn.Module, width: int) -> bool:
    """Whether a module holds a matrix that reads the residual stream, and another that writes to it."""
    widths = list(_matrices(module))
    reads, writes = ([pair[side] == width for pair in widths] for side in (0, 1))
    return len(widths) > 1 and any(reads) and any(writes)


def _mentions(module: nn.Module, names: set[str]) -> bool:
    """Whether the code of a module, or of one inside, uses a name."""
    return any(names & _names_used(type(each)) for each in module.modules())


def _names_used(kind: type[nn.Module]) -> set[str]:
    """Names that the methods of a module's class refer to."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    functions = (inspect.unwrap(f) for base in bases for f in vars(base).values() if inspect.isfunction(f))
    return {name for function in functions for name in function.__code__.co_names}
