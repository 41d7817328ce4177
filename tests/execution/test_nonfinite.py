"""The first module whose output is not finite is found, whatever follows; then the loss, then the first gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import LossOutput
from lightning_mm.execution.nonfinite import NonFiniteSource, find_nonfinite


class Block(nn.Module):
    """A linear layer with something done behind it."""

    def __init__(self, after: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.linear, self.after = nn.Linear(4, 4), after

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        return (self.after(self.linear(x)),)


class Stack(nn.Module):
    """Three blocks and a head, each given a mask with infinite values, as eager attention is."""

    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            (x,) = block(x, attention_mask=torch.full((1, 1), -torch.inf))
        return self.head(x)


def found(model: Stack, scale: float = 1.0) -> NonFiniteSource | None:
    """What is found in two rows of three tokens; the second row is ``scale`` times as large."""
    x_BLD = torch.ones(2, 3, 4) * torch.tensor([1.0, scale]).view(2, 1, 1)
    regions, targets = torch.ones(2, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    batch = Batch({"x": x_BLD}, regions, torch.tensor([0, 1, 3, 4]), targets, ())

    def objective(given: Batch) -> LossOutput:
        log_p = model(given.inputs["x"]).log_softmax(-1).flatten(0, 1)[given.supervised]
        nll = -log_p[:, 0]
        return LossOutput(nll.sum(), 4, nll.detach(), nll.detach() < 0)

    return find_nonfinite(model, batch, objective, dict(model.named_parameters()))


def overflow(x: Tensor) -> Tensor:
    return x * 1e30 * torch.where(x.abs() > 1e6, 1e30, 1e-30)


def no_slope_at_zero(x: Tensor) -> Tensor:
    """The square root of zero has an infinite slope, and zero times that is NaN; its value is zero."""
    return x + (x * 0.0).abs().sqrt()


def test_the_first_module_is_named_and_not_those_that_follow() -> None:
    model = Stack(Block(), Block(), Block())
    with torch.no_grad():
        model.blocks[1].linear.weight[2, 1] = torch.nan
    source = found(model)
    assert source is not None
    assert (source.name, source.rows) == ("blocks.1.linear", (0, 1))
    assert source.what == "the output of blocks.1.linear (Linear), whose weight is not finite"


def test_what_is_spoiled_between_modules_is_put_down_to_the_one_around_them_and_its_row() -> None:
    torch.manual_seed(3)
    source = found(Stack(Block(), Block(overflow), Block()), scale=1e9)
    assert source is not None
    assert (source.name, source.rows) == ("blocks.1", (1,))


def test_a_gradient_is_looked_for_from_the_top() -> None:
    source = found(Stack(Block(), Block(no_slope_at_zero), Block()))
    assert source is not None
    assert source.name == "blocks.1.linear.bias"
    assert source.what == "the gradient of blocks.1.linear.bias: outputs and loss are finite"


def test_a_finite_batch_has_no_source_and_nothing_is_left_behind() -> None:
    model = Stack(Block(), Block(), Block())
    assert found(model) is None
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_output_that_no_loss_depends_on_is_no_fault() -> None:
    class Beside(Stack):
        def forward(self, x: Tensor) -> Any:
            self.blocks[2](x * torch.inf)
            return super().forward(x)

    assert found(Beside(Block(), Block(), Block())) is None


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_hooks_go_if_the_forward_pass_fails(fault: type[BaseException]) -> None:
    def fail(_: Tensor) -> Tensor:
        raise fault

    model = Stack(Block(fail), Block())
    with pytest.raises(fault):
        found(model)
    assert not any(module._forward_hooks for module in model.modules())
