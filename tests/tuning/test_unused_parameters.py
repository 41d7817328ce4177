"""What the loss never uses: one definition, the same on meta tensors and on real ones."""

import pytest
import torch

from lightning_mm.execution.loss import supervised_nll
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.planning.meta_modes import skeleton_of
from lightning_mm.planning.meta_trace import find_unused_vision
from lightning_mm.testing.tiny import FAMILIES
from lightning_mm.tuning.unused_parameters import (
    graph_leaves,
    no_saved_tensors,
    only_requires_grad,
    picture_parameters,
    unused_parameters,
    unused_vision_blocks,
)
from tests.helpers.data import Data, Family, batch_of


@pytest.mark.parametrize("name", FAMILIES)
def test_plan_and_fit_find_the_same(name: str, family: Family, data: Data) -> None:
    """The names that a real loss gives no gradient, by autograd itself; LLaVA and LLaVA-NeXT leave one block unread."""
    batch = batch_of(family(name), data, 2)
    mm = MultimodalModel.of(load_model(Backbone(path=str(family(name)))))
    planned = find_unused_vision(skeleton_of(mm.model), mm.layout, batch)
    asked = picture_parameters(mm.model, mm.layout)

    def loss() -> torch.Tensor:
        return supervised_nll(mm.model, mm.head, batch).nll

    with only_requires_grad(mm.model, asked.values()):
        gradients = torch.autograd.grad(loss(), list(asked.values()), allow_unused=True)
        found = unused_parameters(mm, loss)
        with no_saved_tensors():
            used = graph_leaves(loss())
    assert set(found) == {n for n, gradient in zip(asked, gradients, strict=True) if gradient is None} == planned.names
    assert unused_vision_blocks(mm.model, mm.layout, used) == planned.blocks
    assert planned.blocks == mm.layout.vision_blocks[-1:] * (name in ("llava", "llava_next"))


def test_a_tower_without_gradients_is_not_cut(family: Family, data: Data) -> None:
    """The graph says nothing about a tower that runs under no_grad: none of its blocks counts as unused."""
    mm = MultimodalModel.of(load_model(Backbone(path=str(family("llava")))))
    assert unused_vision_blocks(mm.model, mm.layout, set()) == ()
