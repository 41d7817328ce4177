"""``apply_policy`` on models that were loaded elsewhere, for training loops that are not ours."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from lightning_mm.core.errors import UserError
from lightning_mm.models.loading import Backbone
from lightning_mm.tuning import Full, IntermediateOnly, LoRAOnMiddle
from lightning_mm.tuning.apply import apply_policy, prepare_model
from tests.helpers.data import Family


def loaded(family: Family, name: str = "llava") -> Any:
    return AutoModelForImageTextToText.from_pretrained(family(name))


@pytest.mark.parametrize("policy", [IntermediateOnly(layers="1-2"), LoRAOnMiddle(layers="1"), Full()], ids=repr)
def test_it_does_what_a_fit_does(family: Family, policy: Any) -> None:
    model = loaded(family)
    plan = apply_policy(model, policy)
    fitted, same = prepare_model(Backbone(path=str(family("llava"))), policy)
    assert plan == same
    ours, theirs = dict(model.named_parameters()), dict(fitted.model.named_parameters())
    assert {n: p.requires_grad for n, p in ours.items()} == {n: p.requires_grad for n, p in theirs.items()}
    assert [m.training for m in model.modules()] == [m.training for m in fitted.model.modules()]


def test_another_policy_starts_anew(family: Family) -> None:
    model = loaded(family)
    apply_policy(model, Full())
    plan = apply_policy(model, IntermediateOnly(layers="0"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == plan.full


def test_mistakes_are_told(family: Family) -> None:
    model = loaded(family)
    with pytest.raises(UserError, match="Full is no tuning policy"):
        apply_policy(model, Full)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="str is no model of transformers"):
        apply_policy(str(family("llava")), Full())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Linear is no model of transformers"):
        apply_policy(torch.nn.Linear(2, 2), Full())
    apply_policy(model, LoRAOnMiddle(layers="1"))
    with pytest.raises(UserError, match="has adapters already"):
        apply_policy(model, Full())
