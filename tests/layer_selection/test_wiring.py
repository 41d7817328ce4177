"""Every criterion of ``layers: auto`` and every row of drift, recomputed from transformers' own states and gradients.

Two models of a family are held against each other: the criteria are read of the first, drift and transplantation of
both. The oracle reads rows alone and unpadded, and measures in NumPy, SciPy and scikit-learn.

Tolerances: float32 sums in another order, 2e-4 relative, as in ``tests/analysis/test_wiring.py``; differences of losses
and gradients of rows one by one, 1e-3; one row in a hundred of the probe may fall on the other side.
"""

import random
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

import lightning_mm as mm
from lightning_mm.analysis.probing import ProbingOptions
from lightning_mm.data.probe_sets.build import open_probe_set
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.testing.tiny import build_tiny
from tests.helpers import plain_measures
from tests.helpers.plain_answers import batch_loss, write_talks
from tests.helpers.plain_probe_set import PlainVectors, overlap_of_resized, write_scenes
from tests.helpers.plain_states import PlainModel

FAMILIES = ("llava", "qwen2_vl")
LAYERS, BATCHES, SIZE, K = 4, 3, 4, 4
SITES = {"picture": "picture/last", "text": "text/last", "image": "picture/image"}
PLACES = (("picture/last", "text/last"), ("picture/image", "text/text"))


class Compared:
    """What ``inspect`` found in two models of one family, and the oracle's vectors of both."""

    def __init__(self, family: str, folder: Path) -> None:
        base, tuned = build_tiny(family, folder / "base", layers=LAYERS), folder / "tuned"
        moved = PlainModel(base)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for number, block in enumerate(moved.blocks):
                for weight in block.parameters():
                    weight += 0.02 * (number + 1) * torch.randn(weight.shape, generator=generator)
        shutil.copytree(base, tuned)
        moved.model.save_pretrained(tuned)
        scenes = write_scenes(folder, count=40, grouped=0)
        self.probe_set = open_probe_set(scenes, None, RejectedSamples(), max_pictures=99)
        talks = write_talks(folder / "talks.json", BATCHES * SIZE)
        drawn = random.Random(0).sample(talks, len(talks))
        self.batches = [drawn[start : start + SIZE] for start in range(0, len(drawn), SIZE)]
        self.found = mm.inspect(
            base,
            against=tuned,
            probes=self.probe_set,
            data=folder / "talks.json",
            measures="anisotropy",
            neighbours=K,
            probing=ProbingOptions(probes=()),
            text_only=False,
            auto=mm.AutoRange(batches=BATCHES, resamples=3),
            batch_size=6,
        )
        self.plain, self.tuned = (
            PlainVectors(PlainModel(path), scenes, self.probe_set.rows, overlap_of_resized) for path in (base, tuned)
        )

    def criterion(self, name: str) -> Any:
        assert self.found.selection is not None
        (one,) = (each for each in self.found.selection.criteria if each.name == name)
        return one

    def check(self, name: str, expected: Sequence[float], **close: float) -> None:
        assert self.criterion(name).scores.tolist() == pytest.approx(list(expected), **(close or {"rel": 2e-4}))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compared]:
    return cache(lambda family: Compared(family, tmp_path_factory.mktemp(family)))


def vectors(plain: PlainVectors, position: str, groups: set[str] | None = None) -> Any:
    """(T, N, D) of a position, of all rows or of those of some groups."""
    role, _, site = position.partition("/")
    return plain.stacked([row for row in plain.of_role(role) if groups is None or row.group in groups], site)


@pytest.mark.parametrize("family", FAMILIES)
def test_overlap_and_imbalance(family: str, compared: Callable[[str], Compared]) -> None:
    one = compared(family)
    shared, predicted = [], []
    for positions in PLACES:
        a, b, _ = one.plain.pairs(*positions)
        n = a.shape[1]
        chance = (n // 8) / (n - 1)
        shared.append(
            [(plain_measures.overlap(a[t], b[t], n // 8) - chance) / (1 - chance) for t in range(1, LAYERS + 1)]
        )
        for first, second in ((a, b), (b, a)):
            predicted.append([1 - plain_measures.imbalance(first[t], second[t]) for t in range(1, LAYERS + 1)])
    one.check("overlap", np.mean(shared, 0), abs=1e-6)
    one.check("imbalance", np.mean(predicted, 0), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_dimension_influence_and_angle(family: str, compared: Callable[[str], Compared]) -> None:
    one = compared(family)
    last, text, image = (vectors(one.plain, position) for position in ("picture/last", "text/last", "picture/image"))
    one.check("dimension", [plain_measures.gride(x) for x in last[1:]])

    def changes(name: str, *sides: Any) -> Any:
        formula = plain_measures.BLOCK[name]
        # Before the first block all last tokens are one, so that its influence has a direction all the same.
        return np.mean([[formula(x[t], x[t + 1]) for t in range(LAYERS)] for x in sides], 0)

    one.check("influence", changes("block_influence", image, last))
    one.check("angle", changes("angular_distance", last, text))
    names = sorted({row.group for row in one.probe_set.rows})
    generator = torch.Generator().manual_seed(0)
    for resampled in one.criterion("influence").resampled:
        order = torch.randperm(len(names), generator=generator)[: (len(names) + 1) // 2].tolist()
        kept = {names[i] for i in order}
        halves = (vectors(one.plain, position, kept) for position in ("picture/image", "picture/last"))
        assert resampled.tolist() == pytest.approx(list(changes("block_influence", *halves)), rel=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_entailment(family: str, compared: Callable[[str], Compared]) -> None:
    """Ridge regression, one group left out at a time, with the penalty that the other groups prefer."""
    one = compared(family)
    rows, truth = one.plain.entailment("hard")
    groups, x_TND = one.plain.groups(rows), one.plain.stacked(rows, "last")
    expected = []
    for x in x_TND[1:]:
        z, y = (x - x.mean(0)) / x.std(0, ddof=1), 2.0 * truth - 1
        told = np.empty((4, len(y)))
        for p, penalty in enumerate((0.1, 1.0, 10.0, 100.0)):
            for group in np.unique(groups):
                inside = groups == group
                fitted = Ridge(alpha=penalty * x.shape[1]).fit(z[~inside], y[~inside])
                told[p, inside] = fitted.predict(z[inside])
        errors = (told - y) ** 2
        best = [errors[:, groups != group].sum(1).argmin() for group in groups]
        expected.append((told[best, np.arange(len(y))] * y > 0).mean())
    one.check("entailment", expected, abs=0.013)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family: str, compared: Callable[[str], Compared]) -> None:
    one = compared(family)
    plain, gradients = one.plain.model, []
    for batch in one.batches:
        plain.model.zero_grad()
        batch_loss(plain, batch).backward()
        gradients.append([torch.cat([p.grad.flatten() for p in block.parameters()]).double() for block in plain.blocks])
    plain.model.zero_grad()
    weights = [torch.cat([p.detach().flatten() for p in block.parameters()]).double() for block in plain.blocks]
    relative, fisher, clear = [], [], []
    for layer, weight in enumerate(weights):
        g = torch.stack([each[layer] for each in gradients])
        relative.append(float((g.norm(dim=1) / weight.norm()).mean().log()))
        fisher.append(float((g.square().sum(1) / len(weight)).mean().log()))
        noise = (g - g.mean(0)).square().sum(1).mean()
        clear.append(float((g.mean(0).square().sum() / noise).log()))
    for name, expected in (("rgn", relative), ("fisher", fisher), ("snr", clear)):
        one.check(name, expected, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_transplanted_blocks(family: str, compared: Callable[[str], Compared]) -> None:
    """Loss of the base minus that of the base with a block of the tuned model and its neighbours."""
    one = compared(family)
    base, tuned = one.plain.model, one.tuned.model
    own = list(base.blocks)
    gains = []
    with torch.no_grad():
        for middle in range(LAYERS):
            window = [layer for layer in (middle - 1, middle, middle + 1) if 0 <= layer < LAYERS]
            before = [float(batch_loss(base, batch)) for batch in one.batches]
            for layer in window:
                base.blocks[layer] = tuned.blocks[layer]
            after = [float(batch_loss(base, batch)) for batch in one.batches]
            for layer in window:
                base.blocks[layer] = own[layer]
            gains.append(np.mean(before) - np.mean(after))
    one.check("transplant", gains, abs=1e-4)
    assert np.ptp(gains) > 0.01, "what changes nothing shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_drift(family: str, compared: Callable[[str], Compared]) -> None:
    one = compared(family)
    then, now = (vectors(plain, "picture/last") for plain in (one.plain, one.tuned))
    k = min(10, then.shape[1] // 8)
    one.check("drift", [1 - plain_measures.overlap(then[t], now[t], k) for t in range(1, LAYERS + 1)], abs=1e-6)
    formulas: dict[str, Callable[[Any, Any], float]] = {
        "drift_overlap": lambda a, b: plain_measures.overlap(a, b, K),
        "drift_cka": plain_measures.cka,
        "drift_procrustes": plain_measures.procrustes,
        "drift_cosine": lambda a, b: float(plain_measures.cosines(a, b).mean()),
        "drift_id": lambda a, b: plain_measures.gride(b) - plain_measures.gride(a),
    }
    for site, position in SITES.items():
        before, after = (vectors(plain, position) for plain in (one.plain, one.tuned))
        for measure, formula in formulas.items():
            profile = one.found.profile(measure, site, model=1)
            assert sorted(profile) == list(range(-1, LAYERS))
            for layer in range(LAYERS):
                expected = formula(before[layer + 1], after[layer + 1])
                assert profile[layer].value == pytest.approx(expected, rel=2e-4, abs=2e-4), f"{measure} {site} {layer}"
    assert not one.found.profile("drift_cka", "text", model=0)
    for model, plain in enumerate((one.plain, one.tuned)):  # the first model is step 0
        x = vectors(plain, "text/last")
        profile = one.found.profile("anisotropy", "text", model=model)
        expected = [plain_measures.SINGLE["anisotropy"](x[t]) for t in range(1, LAYERS + 1)]
        assert [profile[layer].value for layer in range(LAYERS)] == pytest.approx(expected, rel=2e-4)
