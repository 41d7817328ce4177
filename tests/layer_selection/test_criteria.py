"""What layers are chosen by where something is missing: rows, gradients, weights of floating point, memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mm.analysis.drift import measure_drift
from lightning_mm.analysis.geometry import gride_scales, measure_geometry
from lightning_mm.analysis.hidden_states import ROLE_SITES, HiddenStates
from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.layer_selection import gradient_criteria as gradient_room
from lightning_mm.layer_selection.forward_criteria import forward_criteria
from lightning_mm.layer_selection.gradient_criteria import (
    GradientScores,
    gradient_criteria,
    gradient_scores,
    try_gradient_scores,
)
from lightning_mm.layer_selection.layer_range_search import Criterion, reliability
from lightning_mm.layer_selection.select import AutoRange, select_layers
from lightning_mm.layer_selection.transplant_criterion import transplant_gains, transplanted
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.models.lora import LoRA
from lightning_mm.tuning import LoRAOnMiddle
from lightning_mm.tuning.apply import apply_plan
from tests.helpers.data import Data, Family, batch_of, make_probe_rows, make_rows

CPU = torch.device("cpu")


def probe_set_of(folder: Path, captioned: int, count: int = 24) -> ProbeSet:
    """Pictures of which only some have captions."""
    file = make_probe_rows(folder, count)
    rows = json.loads(file.read_text())
    for row in rows[captioned:]:
        del row["caption"], row["false_captions"]
    file.write_text(json.dumps(rows))
    return MMDataModule(probes=str(file), processor="none").probe_set()


def reading_of(probe_set: ProbeSet, layers: int = 8, seed: int = 0) -> HiddenStates:
    """Noise at every place that rows have."""
    generator = torch.Generator().manual_seed(seed)
    addresses = {}
    for role, sites in ROLE_SITES.items():
        rows = tuple((row.id, 0) for row in probe_set.rows if row.role == role)
        addresses |= {f"{role}/{site}": rows for site in sites if rows and site != "object"}
    features = {place: torch.randn(layers + 1, len(a), 6, generator=generator) for place, a in addresses.items()}
    return HiddenStates(0, features, addresses)


def left_out() -> list[str]:
    return [d.value for d in decision_log() if d.name == "auto.criteria"]


def test_two_captions_are_enough(tmp_path: Path) -> None:
    """Most halves of the pictures hold neither; they say nothing, and nothing breaks."""
    decision_log().clear()
    probe_set = probe_set_of(tmp_path, captioned=2)
    options = AutoRange(resamples=12)
    selection = select_layers(reading_of(probe_set), probe_set, None, options, CPU)
    assert not selection.significance.found
    found = {criterion.name: criterion for criterion in selection.criteria}
    assert {"dimension", "influence", "angle"} <= found.keys()
    assert "without entailment" in left_out()
    json.dumps(selection.to_dict())


def test_a_half_without_rows_is_undefined(tmp_path: Path) -> None:
    probe_set = probe_set_of(tmp_path, captioned=4)
    made = forward_criteria(reading_of(probe_set), probe_set, ("imbalance", "influence"), 12, 0, CPU)
    by_name = {criterion.name: criterion for criterion in made}
    undefined = by_name["imbalance"].resampled.isnan().all(1)
    assert 0 < int(undefined.sum()) < 12
    assert not by_name["influence"].resampled[:, 1:].isnan().any()


def test_every_criterion_that_is_left_out_is_named(tmp_path: Path) -> None:
    decision_log().clear()
    probe_set = probe_set_of(tmp_path, captioned=0)
    selection = select_layers(reading_of(probe_set), probe_set, None, AutoRange(resamples=4), CPU)
    named = {criterion.name for criterion in selection.criteria}
    assert {f"without {name}" for name in ("overlap", "imbalance", "entailment")} <= set(left_out())
    assert not named & {"overlap", "imbalance", "entailment"}
    with pytest.raises(UserError, match="None of the criteria"):
        select_layers(reading_of(probe_set), probe_set, None, AutoRange(criteria=("overlap", "rgn")), CPU)
    with pytest.raises(UserError, match="None of the probe rows"):
        select_layers(HiddenStates(0, {}, {}), probe_set, None, AutoRange(), CPU)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"resamples": 1}, r"auto\.resamples is 1"),
        ({"batches": 1}, r"auto\.batches is 1"),
        ({"price": -0.1}, r"auto\.price is -0.1"),
        ({"price": float("nan")}, r"auto\.price is nan"),
        ({"weights": {"meanings": 1.0}}, "no family of criteria 'meanings'"),
        ({"weights": {"meaning": -1.0}}, r"auto\.weights\.meaning is -1"),
        ({"criteria": ()}, r"auto\.criteria is empty"),
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        AutoRange(**wrong)


def gradients_of(shape: Tensor, batches: int = 3) -> GradientScores:
    generator = torch.Generator().manual_seed(0)
    noisy = shape * (1 + 0.01 * torch.rand(batches, len(shape), generator=generator, dtype=torch.float64))
    return GradientScores(noisy, noisy, noisy.mean(0), noisy)


def test_a_budget_that_the_margins_do_not_leave_is_kept(tmp_path: Path) -> None:
    probe_set = probe_set_of(tmp_path, captioned=0)
    scores = gradients_of(torch.linspace(1, 2, 32, dtype=torch.float64))
    options = AutoRange(criteria=("rgn", "fisher"))
    for budget in (28, 30, 31, 32):
        chosen = select_layers(reading_of(probe_set, 32), probe_set, scores, options, CPU, f"auto:{budget}")
        assert len(chosen.chosen.layers) == budget
        assert "no layer is beyond chance" in chosen.why[0], "a window fits; what lacks is evidence"
    ends = torch.ones(40, dtype=torch.float64)
    ends[:2] = ends[-2:] = 9.0
    chosen = select_layers(reading_of(probe_set, 40), probe_set, gradients_of(ends), options, CPU)
    assert "outermost 2 blocks" in chosen.why[0]


def test_a_block_without_gradient_has_no_say_and_silences_nobody() -> None:
    shape = torch.tensor([1.0, 0.0, 4.0, 2.0], dtype=torch.float64)
    for criterion in gradient_criteria(gradients_of(shape), ("rgn", "snr", "fisher"), 8):
        assert criterion.scores.isnan().tolist() == [False, True, False, False]
        assert reliability(criterion) > 0.9
    unsure = Criterion("x", torch.arange(4.0), torch.full((3, 4), torch.nan), "meaning")
    assert reliability(unsure) == 0


@pytest.mark.parametrize("pictures", [0, 1])
def test_gradients_of_batches_without_pictures(pictures: int, family: Family, data: Data, tmp_path: Path) -> None:
    """Mllama's cross-attention (block 1) gets no gradient from them: zero in such a batch, undefined if in none."""
    file = tmp_path / "text.json"
    file.write_text(json.dumps(make_rows(tmp_path, 6, seed=3, text_only=True)))
    plain = batch_of(family("mllama"), {"train": file})
    batches = [plain, batch_of(family("mllama"), data) if pictures else batch_of(family("mllama"), {"train": file}, 2)]
    model: Any = load_model(Backbone(path=str(family("mllama")))).eval().requires_grad_(False)
    scores = gradient_scores(MultimodalModel.of(model), batches, CPU)
    assert scores.relative_norm[0].ne(0).tolist() == [True, False, True, True]
    assert bool(scores.relative_norm[1, 1]) == bool(pictures)
    assert scores.signal_to_noise.isnan().tolist() == [False, not pictures, False, False]


def adapted(family: Family) -> tuple[nn.Module, ModelLayout]:
    """With fresh adapters, which change nothing yet."""
    model: Any = load_model(Backbone(path=str(family("llava")))).eval()
    layout = ModelLayout.of(model)
    apply_plan(MultimodalModel(model, layout), LoRAOnMiddle(layers="1-2", lora=LoRA(r=2)).plan(layout))
    return model.eval().requires_grad_(False), layout


def test_adapters_do_not_change_whose_gradients_are_measured(family: Family, data: Data) -> None:
    base: Any = load_model(Backbone(path=str(family("llava")))).eval().requires_grad_(False)
    batches = [batch_of(family("llava"), data, size) for size in (2, 3)]
    expected = gradient_scores(MultimodalModel.of(base), batches, CPU)
    found = gradient_scores(MultimodalModel(*adapted(family)), batches, CPU)
    for name in ("relative_norm", "fisher", "signal_to_noise"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-9, rtol=1e-4)


def test_gradients_that_cannot_be_had_are_said_to_be_missing(
    family: Family, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_model(Backbone(path=str(family("llava")))).eval().requires_grad_(False)
    layout = ModelLayout.of(model)
    batches = [batch_of(family("llava"), data, size) for size in (2, 3)]

    def said(batches: list[Any]) -> str:
        decision_log().clear()
        assert try_gradient_scores(MultimodalModel(model, layout), batches, CPU, ("rgn",)) is None
        (told,) = [d for d in decision_log() if d.name == "auto.criteria"]
        return told.reason

    assert try_gradient_scores(MultimodalModel(model, layout), batches, CPU, ("overlap",)) is None
    assert "1 batches" in said(batches[:1])

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(gradient_room, "gradient_scores", full)
        assert "out of memory" in said(batches)
    projection = model.get_submodule(layout.layers[1]).self_attn.q_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    assert "quantised" in said(batches)


def test_a_tuned_model_with_adapters_is_transplanted_whole(family: Family, data: Data) -> None:
    """Exactly: the hybrid of all blocks is the adapted model, and the base is itself afterwards."""
    base: Any = load_model(Backbone(path=str(family("llava")))).eval().requires_grad_(False)
    tuned, layout = adapted(family)
    for name, parameter in tuned.named_parameters():
        if ".lora_B" in name:
            parameter.normal_()
    batch = batch_of(family("llava"), data)
    before = [block for name in layout.layers for block in base.get_submodule(name).modules()]
    with torch.no_grad(), transplanted(base, tuned, layout.layers):
        assert torch.equal(base(**batch.inputs).logits, tuned(**batch.inputs).logits)
    assert [block for name in layout.layers for block in base.get_submodule(name).modules()] == before
    gains = transplant_gains(MultimodalModel(base, layout), tuned, [batch], CPU, width=0)
    assert gains[0].ne(0).tolist() == [False, True, True, False]


def test_dimensions_have_one_scale_everywhere(tmp_path: Path) -> None:
    probe_set = probe_set_of(tmp_path, captioned=24)
    start, now = reading_of(probe_set, seed=1), reading_of(probe_set, seed=2)
    moved = measure_drift(start, now, probe_set, 10, CPU).profile("drift_id", "picture")
    before, after = (
        measure_geometry(x, probe_set, ("id_gride",), 10, CPU).profile("id_gride", "picture") for x in (start, now)
    )
    for layer, row in moved.items():
        assert row.value == pytest.approx((after[layer].value or 0) - (before[layer].value or 0))
    (criterion,) = forward_criteria(now, probe_set, ("dimension",), 2, 0, CPU)
    assert criterion.scores.tolist() == pytest.approx([after[layer].value for layer in range(8)], rel=1e-6)
    assert gride_scales(1000) == (16, 32)
