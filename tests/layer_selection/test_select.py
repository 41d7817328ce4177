"""``layers: auto``: a planted range is found, a random model shows no evidence, what is chosen is trained and kept."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mm.analysis.hidden_states import HiddenStates, extract_hidden_states, gather_hidden_states
from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.probe_sets.probe_set import ProbeRow, ProbeSet
from lightning_mm.layer_selection.gradient_criteria import gradient_scores
from lightning_mm.layer_selection.select import AutoRange, auto_layers_option, select_layers, with_layers
from lightning_mm.layer_selection.transplant_criterion import transplant_gains, transplanted
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.testing.tiny import build_tiny
from lightning_mm.tuning import EarlyLayers, IntermediateOnly
from tests.helpers.data import Family, batch_of, make_probe_rows
from tests.helpers.training import train

CPU = torch.device("cpu")
LAYERS = 8


class Planted(nn.Module):
    """A block whose output carries a meaning that the stream below and above it does not have.

    What was added by the block below is taken off first, so that blocks outside the range compute as they always did.
    """

    def __init__(self, block: nn.Module, meaning: "Meaning", enters: bool, leaves: bool) -> None:
        super().__init__()
        self.block, self.meaning, self.enters, self.leaves = block, meaning, enters, leaves

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        signal = self.meaning.of_batch[:, None]
        output = self.block(hidden_states - signal if self.enters else hidden_states, *args, **kwargs)
        if not self.leaves:
            return output
        return output + signal if isinstance(output, Tensor) else (output[0] + signal, *output[1:])


class Meaning:
    """What each probe row means, looked up by what the model is given."""

    def __init__(self, rows: Iterator[tuple[bytes, Tensor]], image_token: int) -> None:
        self.by_input = dict(rows)
        self.image_token = image_token
        self.of_batch = torch.empty(0)

    def note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.of_batch = torch.stack([self.by_input[key] for key in keys(kwargs, self.image_token)])


def keys(inputs: dict[str, Tensor], image_token: int) -> list[bytes]:
    """Each row's text and picture, padding left out."""
    pictures = iter(inputs["pixel_values"]) if "pixel_values" in inputs else iter(())
    found = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        told = ids[mask.bool()].numpy().tobytes()
        found.append(told + (next(pictures).numpy().tobytes() if (ids == image_token).any() else b""))
    return found


def meanings(probe_set: ProbeSet, data: MMDataModule, size: int) -> Iterator[tuple[bytes, Tensor]]:
    """Pictures and their captions mean the same; whether a caption belongs is a direction of its own."""
    generator = torch.Generator().manual_seed(0)
    by_picture: dict[str, Tensor] = {}
    truth = torch.randn(size, generator=generator)
    for batch in data.probe_loader(probe_set):
        for key, row in zip(keys(batch.inputs, data.processing.image_token_ids[0]), batch.rows, strict=True):
            yield key, _meaning(row, truth, by_picture, generator)


def _meaning(row: ProbeRow, truth: Tensor, by_picture: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    if row.role == "entailment":
        label = next(value for name, value in row.labels.items() if name.startswith("entailment"))
        return 0.5 * truth * (1.0 if label else -1.0)
    return by_picture.setdefault(row.id.rpartition("/")[0] or row.group, torch.randn(len(truth), generator=generator))


def planted(folder: Path, data: MMDataModule, first: int, last: int) -> tuple[nn.Module, ModelLayout]:
    model: Any = load_model(Backbone(path=str(folder))).eval()
    layout = ModelLayout.of(model)
    meaning = Meaning(meanings(data.probe_set(), data, 32), data.processing.image_token_ids[0])
    model.register_forward_pre_hook(meaning.note, with_kwargs=True)
    blocks = model.get_submodule(layout.layers[0].rpartition(".")[0])
    for index in range(first, min(last + 2, LAYERS)):
        blocks[index] = Planted(blocks[index], meaning, enters=index > first, leaves=index <= last)
    return model, layout


def read_all(model: nn.Module, layout: ModelLayout, data: MMDataModule) -> HiddenStates:
    with torch.no_grad():
        reading = gather_hidden_states(
            extract_hidden_states(MultimodalModel(model, layout), data.probe_loader(data.probe_set()), CPU),
            data.probe_set(),
        )
    assert reading is not None
    return reading


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llava", tmp_path_factory.mktemp("deep") / "llava", layers=LAYERS)


@pytest.fixture(scope="module")
def probing_data(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> MMDataModule:
    file = make_probe_rows(tmp_path_factory.mktemp("probes"), 64)
    return MMDataModule(probes=str(file), processor=str(deep), batch_size=16, num_workers=0)


@pytest.mark.parametrize(("first", "last"), [(2, 3), (3, 5), (4, 6)])
def test_a_planted_range_is_found(first: int, last: int, deep: Path, probing_data: MMDataModule) -> None:
    model, layout = planted(deep, probing_data, first, last)
    reading = read_all(model, layout, probing_data)
    selection = select_layers(reading, probing_data.probe_set(), None, AutoRange(), CPU)
    assert selection.significance.found, selection.why
    assert selection.chosen.layers == tuple(range(first, last + 1)), selection.to_dict()
    assert selection.chosen.first_range[0] <= first <= selection.chosen.first_range[1]
    assert set(selection.controls) == {"EarlyLayers", "LateLayers", "UniformSparse", "RandomLayers"}
    json.dumps(selection.to_dict())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_weights_show_no_evidence(seed: int, probing_data: MMDataModule, tmp_path: Path, deep: Path) -> None:
    torch.manual_seed(seed)
    model = load_model(Backbone(path=str(deep))).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05 * (seed + 1))
    reading = read_all(model, ModelLayout.of(model), probing_data)
    selection = select_layers(reading, probing_data.probe_set(), None, AutoRange(), CPU)
    assert not selection.significance.found, selection.significance
    assert "no evidence" in selection.why[0]
    assert selection.chosen.layers == (2, 3)  # 25 % to 50 % of eight


def test_a_budget_is_kept(deep: Path, probing_data: MMDataModule) -> None:
    model, layout = planted(deep, probing_data, 3, 5)
    reading = read_all(model, layout, probing_data)
    selection = select_layers(reading, probing_data.probe_set(), None, AutoRange(), CPU, "auto:2")
    assert len(selection.chosen.layers) == 2
    assert set(selection.chosen.layers) < {3, 4, 5}


def test_gradient_scores_are_those_of_autograd(family: Family, data: dict[str, Path]) -> None:
    """1e-5: the same gradients, squared and summed in another order."""
    model: Any = load_model(Backbone(path=str(family("llava")))).eval()
    model.requires_grad_(False)
    layout = ModelLayout.of(model)
    batches = [batch_of(family("llava"), data, size) for size in (2, 3)]
    scores = gradient_scores(MultimodalModel(model, layout), batches, CPU)
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    for k, batch in enumerate(batches):
        names = {n: p.requires_grad_() for n, p in model.named_parameters() if layout.locations[n].layer == 1}
        labels = torch.full_like(batch.inputs["input_ids"], -100)
        labels.view(-1)[batch.supervised + 1] = batch.targets
        loss = model(**batch.inputs, labels=labels).loss
        gradients = torch.autograd.grad(loss, list(names.values()))
        squared = sum(float(g.square().sum()) for g in gradients)
        weights = sum(float(p.detach().square().sum()) for p in names.values())
        assert float(scores.relative_norm[k, 1]) == pytest.approx((squared / weights) ** 0.5, rel=1e-5)
        assert float(scores.fisher[k, 1]) == pytest.approx(squared / sum(p.numel() for p in names.values()), rel=1e-5)
        model.requires_grad_(False)


def test_auto_is_written_out(family: Family, data: dict[str, Path], probes: Path, tmp_path: Path) -> None:
    decision_log().clear()
    options = AutoRange(resamples=4, batches=2)
    policy = IntermediateOnly(layers="auto:2")
    module, trainer = train(
        family("llava"), {**data, "probes": probes}, tmp_path, tuning=policy, auto=options, max_steps=1
    )
    assert module.selection is not None
    assert module.census.layers == module.selection.chosen.layers
    assert "auto" not in module.census.policy
    assert "model.tuning.layers" in {d.name for d in decision_log()}
    trainer.save_checkpoint(tmp_path / "auto.ckpt")
    resumed, _ = train(
        family("llava"),
        {**data, "probes": probes},
        tmp_path,
        tuning=IntermediateOnly(layers=str(module.tuning.layers)),  # type: ignore[attr-defined]
        max_steps=2,
        ckpt_path=tmp_path / "auto.ckpt",
    )
    assert resumed.census.digest == module.census.digest


def test_auto_stands_in_layers_and_in_budget() -> None:
    assert auto_layers_option(IntermediateOnly(layers="auto")) == "layers"
    assert auto_layers_option(EarlyLayers(budget="auto:25%")) == "budget"
    assert auto_layers_option(IntermediateOnly(layers="6-16")) is None
    assert with_layers(EarlyLayers(budget="auto"), (3, 4, 5)) == EarlyLayers(budget="3-5")


def test_a_wrong_criterion_says_which_there_are() -> None:
    with pytest.raises(UserError, match="overlap"):
        AutoRange(criteria=("overlapp",))


def test_transplants_are_exact_and_leave_the_base_as_it_was(family: Family, data: dict[str, Path]) -> None:
    """All blocks make the tuned model (which differs in blocks only), none the base, one the hybrid made by hand."""
    base: Any = load_model(Backbone(path=str(family("llava")))).eval().requires_grad_(False)
    layout = ModelLayout.of(base)
    tuned = copy.deepcopy(base)
    for name in layout.layers[1:3]:
        for parameter in tuned.get_submodule(name).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    batch = batch_of(family("llava"), data)

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model(**batch.inputs).logits

    with transplanted(base, tuned, layout.layers):
        assert torch.equal(logits(base), logits(tuned))
    with transplanted(base, tuned, []):
        own = logits(base)
    assert not torch.equal(own, logits(tuned))
    gains = transplant_gains(MultimodalModel(base, layout), tuned, [batch], CPU, width=0)
    assert gains[0, [0, 3]].tolist() == [0, 0]
    assert all(gains[0, [1, 2]] != 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert torch.equal(logits(base), own)
