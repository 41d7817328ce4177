"""CausalCallback: curves by layer while a model trains, which is bit-identical to one that is not looked at."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.callbacks import CausalCallback, Schedule
from lightning_mm.core.errors import UserError
from lightning_mm.core.layer_table import LayerRow, read_layers
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.tuning import IntermediateOnly, LoRA, LoRAOnMiddle, TuningPolicy
from tests.helpers.data import Family
from tests.helpers.training import DROPOUT, Losses, train

POLICIES: dict[str, TuningPolicy] = {
    "full rank, dropout": DROPOUT,
    "full rank": IntermediateOnly(layers="1-2"),
    "adapters": LoRAOnMiddle(layers="1-2", lora=LoRA(r=2)),
}


def rows_of(folder: Path) -> dict[tuple[int, str, str], dict[int, LayerRow]]:
    found: dict[tuple[int, str, str], dict[int, LayerRow]] = {}
    for row in read_layers(folder / "layers.csv")[0]:
        if row.analysis == "causal":
            found.setdefault((row.step, row.measure, row.site), {})[row.layer] = row
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_training_is_the_same_and_curves_are_made(
    policy: str, family: Family, data: dict[str, Path], probes: Path, tmp_path: Path
) -> None:
    files = {**data, "probes": probes}
    options: dict[str, Any] = {"tuning": POLICIES[policy], "max_steps": 4, "accumulate_grad_batches": 2}
    plain, watched = Losses(), Losses()
    start = {name: p.detach().clone() for name, p in load_model(Backbone(path=str(family("llava")))).named_parameters()}
    alone, _ = train(family("llava"), files, tmp_path / "a", callbacks=[plain], **options)
    callback = CausalCallback(Schedule(every=2, budget=None), count=3, parts=("ablation", "knockout", "flow"))
    seen, _ = train(family("llava"), files, tmp_path / "b", callbacks=[watched, callback], **options)
    assert watched.by_step == plain.by_step
    for name, parameter in alone.trainable.items():
        assert torch.equal(parameter, seen.trainable[name]), name
    assert all(parameter.data_ptr() for parameter in seen.model.parameters())
    found = rows_of(tmp_path / "b")
    for step in (0, 2, 4):
        for measure, site in (("ablation", "skip"), ("knockout", "image->question/pre"), ("flow", "image->last")):
            assert set(found[step, measure, site]) == {0, 1, 2, 3}, (step, measure)
    for name, held in callback._start.items():
        assert torch.equal(held, start[name]), f"{name} is kept as it was before the first step"
        assert not torch.equal(held, seen.model.get_parameter(name)), f"{name} has been trained since"
    curve = found[4, "transplant", "cumulative/picture"]
    assert (4, "transplant", "cumulative/picture") in found
    assert (0, "transplant", "cumulative/picture") not in found, "nothing has been trained yet"
    assert max(curve) == max(seen.plan.layers)
    assert all(0 <= (row.value or 0) <= 1 and row.null is not None for row in curve.values())


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to ask"):
        CausalCallback(count=0)
    with pytest.raises(UserError, match="no part 'nonsense'"):
        CausalCallback(parts=["nonsense"])
