"""What planning takes from torch beside its documented interface; a failure names what a release has changed."""

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers.modeling_outputs import BaseModelOutput

from lightning_mm.planning.meta_modes import GROUPED_MM, map_tensors, tensors_in


def test_dispatch_modes_see_operations_on_the_meta_device() -> None:
    """torch.utils._python_dispatch.TorchDispatchMode and torch.overrides.TorchFunctionMode."""
    operations: list[str] = []
    functions: list[str] = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            operations.append(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            functions.append(func.__name__)
            return func(*args, **(kwargs or {}))

    weight = torch.empty(3, 2, device="meta")
    with Functions(), Operations():
        torch.nn.functional.linear(torch.empty(4, 2, device="meta"), weight)
    assert "linear" in functions
    assert "aten.mm" in operations


def test_a_storage_is_one_object_however_it_is_viewed() -> None:
    """Tensor.untyped_storage(): saved tensors and weights are recognized by identity."""
    tensor = torch.empty(3, 4, device="meta")
    assert tensor.untyped_storage() is tensor.t().detach().untyped_storage()
    assert tensor.untyped_storage() not in {torch.empty(3, 4, device="meta").untyped_storage()}


def test_pytrees_hold_what_models_pass_around() -> None:
    """torch.utils._pytree.tree_flatten and tree_map_only, with the outputs that transformers registers."""
    one, two = torch.zeros(1), torch.ones(2)
    tree = {"a": (one, [None, 3]), "b": BaseModelOutput(last_hidden_state=two)}
    assert [len(t) for t in tensors_in(tree)] == [1, 2]
    changed = map_tensors(lambda t: t + 1, tree)
    assert isinstance(changed["b"], BaseModelOutput)
    assert isinstance(changed["b"].last_hidden_state, Tensor)
    assert changed["b"].last_hidden_state.tolist() == [2, 2]


def test_products_have_flop_formulas() -> None:
    """torch.utils.flop_counter.flop_registry: formulas by operation, called with ``out_val``."""
    for operation in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.convolution):
        assert operation in flop_registry
    a, b = torch.empty(2, 3, device="meta"), torch.empty(3, 5, device="meta")
    assert flop_registry[torch.ops.aten.mm](a, b, out_val=a @ b) == 2 * 2 * 3 * 5


def test_grouped_products_still_need_a_shape_of_their_own() -> None:
    """aten._grouped_mm: without a formula, and of bfloat16 only on the meta device; else ours can go."""
    rows, experts = torch.empty(6, 8, device="meta"), torch.empty(3, 8, 16, device="meta")
    ends = torch.tensor([2, 4, 6], device="meta", dtype=torch.int32)
    assert GROUPED_MM not in flop_registry
    assert GROUPED_MM(rows.bfloat16(), experts.bfloat16(), ends).shape == (6, 16)
    with pytest.raises(RuntimeError, match="BF16"):
        GROUPED_MM(rows, experts, ends)
