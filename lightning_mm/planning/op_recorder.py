"""Records what a traced forward pass multiplies and what it saves for backward, each with its place in the model.

Data flow: operations, saved tensors and module calls of a skeleton as they come -> ``OpRecorder`` -> lists of
``MatmulRecord`` and ``SavedTensor``. Equal blocks (same class, shapes, flags and inputs) run once; the others copy the
record of the first.

``FlopCounterMode`` counts the same FLOPs (``tests/planning/test_flops.py`` compares them), but as totals of one shape:
what each product grows by, and which of its operands need a gradient, is recorded here with torch's own formulas.
``MemTracker`` needs inputs that require a gradient in every module, which a frozen prefix does not have.

Shapes: B rows, L tokens after padding.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from lightning_mm.data.batch import Batch
from lightning_mm.models.hooks import replace_forward
from lightning_mm.models.layout import ModelLayout, ParameterLocation, Region
from lightning_mm.planning.meta_kernels import placeholder_like
from lightning_mm.planning.meta_modes import GROUPED_MM, map_tensors, tensors_in
from lightning_mm.planning.step_shape import StepShape, patch_counts
from lightning_mm.tuning.unused_parameters import PICTURE_REGIONS


def _grouped_mm_flops(rows: Tensor, experts: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return 2 * out_val.numel() * rows.shape[-1]


_FLOP_FORMULAS = {**flop_registry, GROUPED_MM: _grouped_mm_flops}


@dataclass(frozen=True)
class MatmulRecord:
    """One product of two operands.

    Args:
        location: Region and block it belongs to.
        grows_by: Field of ``StepShape`` that its FLOPs are proportional to.
        units: Value of that field in the traced step.
        flops: Of the forward product; the gradient of each operand costs as much again.
        inputs: Operands that are activations and need a gradient.
        weights: Operands that are weights and need a gradient.
    """

    location: ParameterLocation
    grows_by: str
    units: float
    flops: float
    inputs: int
    weights: int


@dataclass(frozen=True)
class SavedTensor:
    """A storage that autograd saves for backward, recorded once.

    Args:
        location: Region and block that saved it.
        size: Bytes.
        storage: The storage; None for the sum of all that a copied block saves.
        is_weight: Whether it is a copy of a weight in another type.
    """

    location: ParameterLocation
    size: int
    storage: torch.UntypedStorage | None
    is_weight: bool = False


@dataclass
class _ModuleCall:
    """A running module: its products, and the graph nodes of its outputs."""

    location: ParameterLocation
    products: list[MatmulRecord] = field(default_factory=list)
    outputs: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _BlockRecord:
    """What one block did, for the blocks that are equal to it.

    Args:
        output: What it returned.
        products: Its products.
        saved: Bytes that it saved, its inputs left out.
        saves_input: Whether it saved its first input.
    """

    output: Any
    products: tuple[MatmulRecord, ...]
    saved: int
    saves_input: bool


class OpRecorder:
    """Records the products and saved tensors of a skeleton's forward pass while attached to it.

    Args:
        skeleton: The model on the meta device, under its plan.
        layout: Of the plain model.
        batch: On the CPU.
    """

    def __init__(self, skeleton: nn.Module, layout: ModelLayout, batch: Batch) -> None:
        self.shape, self.length = StepShape.of(batch, padded=True), batch.regions.shape[1]
        self.num_real_tokens, self.patch_counts = len(batch.real), set(patch_counts(batch.inputs))
        self.skeleton, self.layout = skeleton, layout
        names = {parameter: name for name, parameter in skeleton.named_parameters()}
        firsts = {name: next(module.parameters(), None) for name, module in skeleton.named_modules()}
        self.locations = {name: layout.location_of(names[p]) for name, p in firsts.items() if p is not None}
        self.locations[layout.head] = ParameterLocation(Region.HEAD)
        self.saved: list[SavedTensor] = []
        self.block_input_bytes: dict[str, int] = {}
        # Storages are held, so that they stay distinct objects.
        self._weights = {p.untyped_storage() for p in skeleton.parameters()}
        self._weight_copies: set[torch.UntypedStorage] = set()
        self._saved_storages: set[torch.UntypedStorage] = set()
        self._running: list[_ModuleCall] = []
        self._calls: list[_ModuleCall] = []
        self._equal_blocks: dict[Any, _BlockRecord] = {}

    @contextmanager
    def attached(self, equal_once: bool) -> Iterator[None]:
        """While active, every module reports its calls.

        Args:
            equal_once: Whether equal blocks run once.
        """
        names = (*self.layout.vision_blocks, *self.layout.layers)
        with ExitStack() as stack:
            for name, location in self.locations.items():
                module = self.skeleton.get_submodule(name)
                stack.enter_context(module.register_forward_pre_hook(partial(self._enter, location)))
                stack.enter_context(module.register_forward_hook(self._leave))
            for name in names:
                block = self.skeleton.get_submodule(name)
                run = partial(self._block, name, equal_once, block)
                replace_forward(stack, block, partial(partial, run))  # given the block's own forward
            yield

    def _enter(self, location: ParameterLocation, *_: Any) -> None:
        self._running.append(_ModuleCall(location))

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        call = self._running.pop()
        call.outputs = tuple(t.grad_fn for t in tensors_in(output) if t.grad_fn is not None)
        if call.products:
            self._calls.append(call)

    def _block(
        self, name: str, equal_once: bool, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a block, or copy the record of an equal one."""
        inputs = tensors_in((args, kwargs))
        self.block_input_bytes[name] = inputs[0].nbytes
        if not equal_once:
            return forward(*args, **kwargs)
        key = (getattr(forward, "__qualname__", ""), *_block_key(block, inputs))  # a skipped block has another forward
        if key not in self._equal_blocks:
            calls, saved = len(self._calls), len(self.saved)
            output = forward(*args, **kwargs)
            products = [p for call in (*self._calls[calls:], self._running[-1]) for p in call.products]
            outside = {t.untyped_storage() for t in inputs}
            own = [s.size for s in self.saved[saved:] if s.storage not in outside]
            saves_input = inputs[0].untyped_storage() in self._saved_storages
            self._equal_blocks[key] = _BlockRecord(output, tuple(products), sum(own), saves_input)
            return output
        record, call = self._equal_blocks[key], self._running[-1]
        location = call.location
        call.products += [replace(p, location=replace(p.location, layer=location.layer)) for p in record.products]
        self.saved.append(SavedTensor(location, record.saved, None))
        if record.saves_input:
            self.record_saved(inputs[0])
        sources = [t for t in (*inputs, *block.parameters()) if t.requires_grad]
        return map_tensors(lambda tensor: placeholder_like(tensor, sources), record.output)

    def record_saved(self, tensor: Tensor) -> Tensor:
        """Record a tensor that autograd saves, weights left out; returns it, as a pack hook does."""
        storage = tensor.untyped_storage()
        if storage not in self._weights and storage not in self._saved_storages:
            self._saved_storages.add(storage)
            location = self._running[-1].location if self._running else ParameterLocation(Region.HEAD)
            self.saved.append(SavedTensor(location, storage.nbytes(), storage, storage in self._weight_copies))
        return tensor

    def record_weight_copy(self, copy: Tensor) -> None:
        """Record that a tensor is a weight in another type."""
        self._weight_copies.add(copy.untyped_storage())

    def record_op(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Record an operation, if it is a product."""
        flop_formula = _FLOP_FORMULAS.get(getattr(func, "overloadpacket", None))
        if flop_formula is None or not self._running:
            return
        # The summand of addmm and baddbmm, which comes first, is no factor.
        operands = [t for t in args if isinstance(t, Tensor) and t.ndim > 1][-2:]
        flops = float(flop_formula(*args, out_val=result))
        weights = [t for t in operands if self._is_weight(t)]
        inputs = [t for t in operands if not self._is_weight(t)]
        call = self._running[-1]
        rows = len(result) if weights and weights[0].ndim == 3 else flops / 2 / weights[0].numel() if weights else None
        growth = self._grows_by(call.location, operands, rows)
        needed = (sum(t.requires_grad for t in inputs), sum(t.requires_grad for t in weights))
        call.products.append(MatmulRecord(call.location, *growth, flops, *needed))

    def _is_weight(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        return storage in self._weights or storage in self._weight_copies

    def _grows_by(self, location: ParameterLocation, operands: list[Tensor], rows: float | None) -> tuple[str, float]:
        """The field of ``StepShape`` that a product's FLOPs grow by, and its value in this step.

        Args:
            location: Of the product.
            operands: Its two factors.
            rows: Of the factor that is multiplied by a weight; None between factors that are no weights.
        """
        shape = self.shape
        sizes = [size for t in operands for size in t.shape[-2:]]
        if location.region is Region.HEAD:
            return "supervised", shape.supervised
        if location.region in (*PICTURE_REGIONS, Region.OTHER):
            square = rows is None and any(sizes.count(count) > 1 for count in self.patch_counts)
            return ("picture_pairs", shape.picture_pairs) if square else ("pixels", shape.pixels)
        if rows is None:
            square = sizes.count(self.length) > 1
            return ("pairs", shape.pairs) if square else ("tokens", shape.tokens)
        # A mixture sends each token to several experts, so that rows are a multiple of the tokens.
        for tokens in (shape.tokens, float(self.num_real_tokens)):
            if rows % tokens == 0:
                return "tokens", tokens
        # Cross-attention takes its keys and values from the tower's output.
        return ("pixels", shape.pixels) if shape.pixels else ("tokens", shape.tokens)

    def products(self, nodes: set[Any]) -> list[MatmulRecord]:
        """Every product, without gradients where the loss does not depend on it.

        Args:
            nodes: Those of the loss's autograd graph.
        """
        found: list[MatmulRecord] = []
        for call in self._calls:
            used = any(output in nodes for output in call.outputs)
            found += call.products if used else [replace(p, inputs=0, weights=0) for p in call.products]
        return found


def _block_key(block: nn.Module, inputs: list[Tensor]) -> tuple[Any, ...]:
    """Equal for blocks that do the same work: class, parameters, plain attributes (but for the index) and inputs."""
    parameters = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
    attributes = tuple(
        (key, value)
        for module in block.modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and not key.endswith(("idx", "index")) and key[0] != "_"
    )
    given = tuple((t.shape, t.dtype, t.requires_grad, t.device) for t in inputs)
    return type(block), parameters, attributes, given
