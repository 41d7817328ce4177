"""What goes on while a step is rehearsed: products, and tensors that are kept for backward, each with its place.

Data flow: operations, saved tensors and modules of a skeleton as they come -> ``Watch`` -> lists of ``Product`` and
``Kept``.

Shapes: B rows, L tokens after padding.

What a forward pass computes and keeps for backward, noted while it is rehearsed.

Data flow: skeleton under a plan + Batch -> ``tally`` -> ``Tally``: products and kept tensors, each with its place.
Blocks that are alike (same class, shapes, flags and inputs) are rehearsed once and counted as often as they stand.

Shapes: B rows, L tokens after padding.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry

from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import supervised_nll
from lightning_mm.models.attention.cpu_kernels import rehearsed, use_cpu_attention
from lightning_mm.models.attention.varlen import RealTokens, unpadded
from lightning_mm.models.layout import ModelLayout, ParameterLocation, Region
from lightning_mm.planning.meta_modes import Bfloat16, OneKernel, Rehearsal, ShortRows, refused, stand_in
from lightning_mm.planning.step_shape import StepShape, patches


def _grouped(rows: Tensor, experts: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return 2 * out_val.numel() * rows.shape[-1]


_COUNTS = {**flop_registry, torch.ops.aten._grouped_mm: _grouped}
_PICTURES = (Region.VISION, Region.CONNECTOR)


@dataclass(frozen=True)
class Product:
    """One product of two operands.

    Args:
        place: Where in the model.
        grows_by: The sum of a step's shape that its cost is proportional to.
        units: How much of that sum there was.
        flops: Of the product itself; each gradient costs the same again.
        inputs: How many operands need a gradient that are no weights.
        weights: How many weights need one.
    """

    place: ParameterLocation
    grows_by: str
    units: float
    flops: float
    inputs: int
    weights: int


@dataclass(frozen=True)
class Kept:
    """A tensor that is kept for backward, each storage once.

    Args:
        place: Where in the model.
        size: Bytes.
        storage: Which; 0 for one that stands for others like it.
        weight: Whether it is a copy of a weight, in another type.
    """

    place: ParameterLocation
    size: int
    storage: int
    weight: bool = False


@dataclass
class _Call:
    """A module at work: its products, and what its output hangs on."""

    place: ParameterLocation
    products: list[Product] = field(default_factory=list)
    outputs: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Alike:
    """What a block did that others like it need not do again."""

    output: Any
    products: tuple[Product, ...]
    inside: int
    keeps_input: bool


class Watch:
    """Notes what goes on in a skeleton while it is attached to it."""

    def __init__(self, skeleton: nn.Module, layout: ModelLayout, batch: Batch) -> None:
        self.shape, self.real, self.length = StepShape.of(batch, padded=True), len(batch.real), batch.regions.shape[1]
        self.patches = set(patches(batch.inputs))
        self.copies: set[int] = set()
        self.weights = {p.untyped_storage()._cdata for p in skeleton.parameters()}
        self.skeleton, self.head = skeleton, layout.head
        names = {parameter: name for name, parameter in skeleton.named_parameters()}
        firsts = {name: next(module.parameters(), None) for name, module in skeleton.named_modules()}
        self.places = {name: layout.location_of(names[p]) for name, p in firsts.items() if p is not None}
        self.places[layout.head] = ParameterLocation(Region.HEAD)
        self.kept: list[Kept] = []
        self.entering: dict[str, int] = {}
        self._storages: dict[int, Tensor] = {}
        self._storages_of_copies: list[Tensor] = []  # held, so that no other takes their addresses
        self._open: list[_Call] = []
        self._calls: list[_Call] = []
        self._seen: dict[Any, _Alike] = {}

    @contextmanager
    def attached(self, layout: ModelLayout, once: bool) -> Iterator[None]:
        """While active, every module reports when it begins and ends."""
        handles = []
        blocks = {self.skeleton.get_submodule(name): name for name in (*layout.vision_blocks, *layout.layers)}
        for name, place in self.places.items():
            module = self.skeleton.get_submodule(name)
            handles.append(module.register_forward_pre_hook(partial(self._enter, place)))
            handles.append(module.register_forward_hook(self._leave))
        held = {block: block.__dict__.get("forward") for block in blocks}
        for block, name in blocks.items():
            block.forward = partial(self._block, name, once, block, block.forward)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block, own in held.items():
                del block.forward
                if own is not None:
                    block.forward = own

    def _enter(self, place: ParameterLocation, *_: Any) -> None:
        self._open.append(_Call(place))

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        call = self._open.pop()
        call.outputs = tuple(t.grad_fn for t in _tensors(output) if t.grad_fn is not None)
        if call.products:
            self._calls.append(call)

    def _block(
        self, name: str, once: bool, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a block, or count it like the one before it."""
        given = _tensors((args, kwargs))
        self.entering[name] = given[0].nbytes
        if not once:
            return forward(*args, **kwargs)
        key = (getattr(forward, "__qualname__", ""), *_likeness(block, given))  # some are passed by
        if key not in self._seen:
            calls, kept = len(self._calls), len(self.kept)
            output = forward(*args, **kwargs)
            products = [p for call in (*self._calls[calls:], self._open[-1]) for p in call.products]
            outside = {t.untyped_storage()._cdata for t in given}
            own = [k.size for k in self.kept[kept:] if k.storage not in outside]
            first = given[0].untyped_storage()._cdata in self._storages
            self._seen[key] = _Alike(output, tuple(products), sum(own), first)
            return output
        alike, call = self._seen[key], self._open[-1]
        call.products += [replace(p, place=replace(p.place, layer=call.place.layer)) for p in alike.products]
        self.kept.append(Kept(call.place, alike.inside, 0))
        if alike.keeps_input:
            self.keep(given[0])
        needed = [t for t in (*given, *block.parameters()) if t.requires_grad]
        return tree_map_only(Tensor, lambda tensor: stand_in(tensor, needed), alike.output)

    def keep(self, tensor: Tensor) -> Tensor:
        """Note a tensor that backward will need."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights and storage._cdata not in self._storages:
            self._storages[storage._cdata] = tensor  # held, so that no other takes its address
            place = self._open[-1].place if self._open else ParameterLocation(Region.HEAD)
            self.kept.append(Kept(place, storage.nbytes(), storage._cdata, storage._cdata in self.copies))
        return tensor

    def copied(self, weight: Tensor) -> None:
        """Note that a tensor is a weight in another type."""
        self._storages_of_copies.append(weight)
        self.copies.add(weight.untyped_storage()._cdata)

    def see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Note an operation, if it is a product."""
        count = _COUNTS.get(getattr(func, "overloadpacket", None))
        if count is None or not self._open:
            return
        # The sum in addmm and baddbmm is no product.
        operands = [t for t in args if isinstance(t, Tensor) and t.ndim > 1][-2:]
        flops = float(count(*args, out_val=result))
        weights = [t for t in operands if self._is_weight(t)]
        inputs = [t for t in operands if not self._is_weight(t)]
        call = self._open[-1]
        rows = len(result) if weights and weights[0].ndim == 3 else flops / 2 / weights[0].numel() if weights else None
        sum_of = self._grows_by(call.place, operands, rows)
        needed = (sum(t.requires_grad for t in inputs), sum(t.requires_grad for t in weights))
        call.products.append(Product(call.place, *sum_of, flops, *needed))

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.weights or tensor.untyped_storage()._cdata in self.copies

    def _grows_by(self, place: ParameterLocation, operands: list[Tensor], rows: float | None) -> tuple[str, float]:
        """By which sum a product grows, and how much of it there is.

        Args:
            place: Of the product.
            operands: Its two.
            rows: Of the operand that is multiplied by a weight; None between operands that are no weights.
        """
        sizes = [size for t in operands for size in t.shape[-2:]]
        if place.region is Region.HEAD:
            return "supervised", self.shape.supervised
        if place.region in (*_PICTURES, Region.OTHER):
            square = rows is None and any(sizes.count(count) > 1 for count in self.patches)
            return ("picture_pairs", self.shape.picture_pairs) if square else ("pixels", self.shape.pixels)
        if rows is None:
            square = sizes.count(self.length) > 1
            return ("pairs", self.shape.pairs) if square else ("tokens", self.shape.tokens)
        # Cross-attention takes its keys and values from what the tower saw.
        # Mixtures send each token to several experts.
        for tokens in (self.shape.tokens, float(self.real)):
            if rows % tokens == 0:
                return "tokens", tokens
        return ("pixels", self.shape.pixels) if self.shape.pixels else ("tokens", self.shape.tokens)

    def needed(self, reached: set[Any]) -> Iterator[Product]:
        """Every product; without gradients where the loss does not depend on it."""
        for call in self._calls:
            counts = any(output in reached for output in call.outputs)
            yield from (p if counts else replace(p, inputs=0, weights=0) for p in call.products)


def _likeness(block: nn.Module, given: list[Tensor]) -> Any:
    """Equal for blocks that do the same work."""
    weights = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
    facts = tuple(
        (key, value)
        for module in block.modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and not key.endswith(("idx", "index")) and key[0] != "_"
    )
    inputs = tuple((t.shape, t.dtype, t.requires_grad, t.device) for t in given)
    return type(block), weights, facts, inputs


def reached_from(node: Any) -> set[Any]:
    """Every node of the graph below one."""
    found: set[Any] = set()
    left = [node] if node is not None else []
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += [below for below, _ in node.next_functions if below is not None]
    return found


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


@dataclass
class Tally:
    """One rehearsed forward pass.

    Args:
        loss: () its summed NLL, without a value.
        products: With no gradients counted where the loss does not depend on them.
        kept: Tensors that backward needs, weights left out.
        read: Weights that need a gradient and on which the loss depends.
        entering: Bytes of what enters each block, by the block's name.
    """

    loss: Tensor
    products: list[Product]
    kept: list[Kept]
    read: set[Tensor]
    entering: dict[str, int]


def tally(
    skeleton: nn.Module,
    layout: ModelLayout,
    batch: Batch,
    bf16: bool = False,
    once: bool = True,
    processor: bool = False,
) -> Tally:
    """Rehearse the training objective of one batch.

    Args:
        skeleton: Under its plan.
        layout: Of the plain model.
        batch: On the CPU.
        bf16: As under autocast to bfloat16.
        once: Rehearse blocks that are alike once.
        processor: As on a CPU, where short rows' attention is written out (``models.processors``).

    Raises:
        UserError: The model branches on values that only its weights could give.
    """
    watch = Watch(skeleton, layout, batch)
    try:
        with ExitStack() as stack:
            stack.enter_context(watch.attached(layout, once))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(watch.keep, lambda tensor: tensor))
            stack.enter_context(OneKernel(watch.see))
            if processor:
                use_cpu_attention(skeleton, stack)
                stack.enter_context(rehearsed(ShortRows(watch.see, (*batch.regions.shape,), bf16)))
            if bf16:
                stack.enter_context(Bfloat16(watch.copied))
            stack.enter_context(Rehearsal(watch.see))
            stack.enter_context(unpadded(RealTokens(batch.real, *batch.regions.shape)))
            loss = supervised_nll(skeleton, skeleton.get_submodule(layout.head), batch).nll
    except (RuntimeError, NotImplementedError, KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
        if once:  # blocks may hand things to one another past their outputs
            return tally(skeleton, layout, batch, bf16, once=False, processor=processor)
        raise refused(skeleton, error) from error
    reached = reached_from(loss.grad_fn)
    read = {node.variable for node in reached if hasattr(node, "variable")}
    return Tally(loss, list(watch.needed(reached)), watch.kept, read, watch.entering)


@dataclass(frozen=True)
class Unread:
    """What of the way from picture to text the loss does not depend on (LLaVA reads its tower below the top).

    Args:
        names: Parameters of the tower and the connector.
        blocks: Vision blocks, by name; a fit passes them by.
        in_tuple: Whether such blocks return tuples.
    """

    names: frozenset[str] = frozenset()
    blocks: tuple[str, ...] = ()
    in_tuple: bool = False


def unread_parts(skeleton: nn.Module, layout: ModelLayout, batch: Batch) -> Unread:
    """Ask one rehearsed step; nothing is unread where the batch has no picture. Changes what needs a gradient."""
    if not any(name.startswith("pixel_values") for name in batch.inputs):
        return Unread()
    asked = {n: p for n, p in skeleton.named_parameters() if layout.location_of(n).region in _PICTURES}
    for parameter in skeleton.parameters():
        parameter.requires_grad_(False)
    for parameter in asked.values():
        parameter.requires_grad_(True)
    in_tuple: list[bool] = []
    top = skeleton.get_submodule(layout.vision_blocks[-1] if layout.vision_blocks else layout.head)
    with top.register_forward_hook(lambda _, __, output: in_tuple.append(isinstance(output, tuple))):
        read = tally(skeleton, layout, batch).read
    unread = [n for n in layout.vision_blocks if read.isdisjoint(skeleton.get_submodule(n).parameters())]
    names = frozenset(name for name, parameter in asked.items() if parameter not in read)
    return Unread(names, tuple(unread), any(in_tuple))
