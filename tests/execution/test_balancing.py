"""The auxiliary loss of mixtures: transformers' own, in value and gradient, where it belongs and nowhere else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.execution.loss import supervised_nll
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.tuning import IntermediateOnly, PerRegion
from tests.helpers.data import Data, Family, batch_of
from tests.helpers.mixtures import mixture_folder
from tests.helpers.training import configured


@pytest.fixture(scope="module")
def mixture(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture_folder(family("qwen3_vl"), tmp_path_factory.mktemp("mixture") / "qwen3_vl_moe")


@pytest.mark.parametrize("chunk", ["off", 3])
def test_training_routers_minimizes_what_transformers_would(chunk: Any, mixture: Path, data: Data) -> None:
    """1e-5: the same float32 arithmetic, with the head's product over fewer rows. The batch is padded."""
    decision_log().clear()
    module = configured(mixture, PerRegion(layers="1-2", layers_mode="full", parts=["router"]))
    module.step.compute = module.compute.__class__(loss_chunk=chunk)
    batch = batch_of(mixture, data)
    assert not batch.inputs["attention_mask"].all()
    assert "balancing loss: 0.001 times" in "".join(map(str, decision_log()))
    found = module.objective(batch)
    (found.objective / found.num_tokens).backward()
    model: Any = load_model(Backbone(path=str(mixture)))
    model.train()
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    labels.view(-1)[batch.supervised + 1] = batch.targets
    expected = model(**batch.inputs, labels=labels, output_router_logits=True)
    expected.loss.backward()
    assert expected.aux_loss > 0.5
    torch.testing.assert_close(found.objective / found.num_tokens, expected.loss, atol=1e-5, rtol=1e-5)
    for name, parameter in module.mm.model.named_parameters():
        if parameter.requires_grad:
            theirs = model.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, theirs, atol=1e-6, rtol=1e-4)


def test_a_config_that_asks_for_it_is_followed_and_no_other(mixture: Path, data: Data, tmp_path: Path) -> None:
    batch = batch_of(mixture, data)
    plain = configured(mixture, IntermediateOnly(layers="1"))
    assert plain.step.balancing is None
    assert plain.objective(batch).balance is None
    plain.mm.model.config.text_config.output_router_logits = True  # type: ignore[union-attr]
    without = supervised_nll(plain.mm.model, plain.mm.head, batch)
    assert without.balance is None
    asked = configured(mixture, IntermediateOnly(layers="1"))
    asked.mm.model.config.text_config.output_router_logits = True  # type: ignore[union-attr]
    step = type(asked.step)(asked.mm, asked.plan, asked.compute, False)
    found = step.objective(batch)
    assert found.balance is not None
    assert found.balance > 0
    torch.testing.assert_close(found.nll, without.nll, atol=1e-4, rtol=1e-5)  # with padding, 40 tokens summed
    batch = replace(batch, shared=object())
    with pytest.raises(UserError, match="share_images is not possible"):
        step.verify_sharing(batch)
