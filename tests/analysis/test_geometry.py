"""Measures by name: what is asked for is measured with the settings that were given, against sklearn and NumPy."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from lightning_mm.analysis.geometry import (
    PAIR_MEASURES,
    PositionData,
    _object_overlap,
    measure_geometry,
    resolve_measures,
)
from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.analysis.select_rows import SelectedRows
from lightning_mm.analysis.summary import summarize_profile, summary_metrics
from lightning_mm.core.peak_note import noted_peak_range
from lightning_mm.data.probe_sets.files import ProbeRow, Role
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.data.sample import Sample, Turn

N, LAYERS, WIDTH, K = 60, 3, 12, 5
ROLES: Mapping[Role, tuple[str, ...]] = {
    "picture": ("last", "image"),
    "text": ("last", "text"),
    "picture_last": ("token",),
    "text_last": ("token",),
}


def read(roles: Mapping[Role, tuple[str, ...]] = ROLES) -> tuple[HiddenStates, ProbeSet]:
    """Hidden states of N pictures and their captions, which share some of what they hold."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(LAYERS, N, WIDTH, generator=generator)
    rows, features, index = [], {}, {}
    for role, sites in roles.items():
        made = []
        for number in range(N):
            images = () if role == "text" else (Path(f"{number}.png"),)
            sample = Sample(f"{number}:{role}", (Turn("user", "a cat"),), images, "t")
            made.append(ProbeRow(f"{number}:{role}", str(number), role, sample, "a cat", {}))
        rows += made
        for site in sites:
            noise = torch.randn(LAYERS, N, WIDTH, generator=generator)
            features[f"{role}/{site}"] = shared + noise + 1
            index[f"{role}/{site}"] = tuple((row.id, 0) for row in made)
    return HiddenStates(0, features, index), ProbeSet(tuple(rows), {}, 0, "t")


def near(x: Tensor) -> list[set[int]]:
    found = NearestNeighbors(n_neighbors=K + 1).fit(x.numpy()).kneighbors(x.numpy(), return_distance=False)
    return [set(row[1:].tolist()) for row in found]


def test_every_layer_with_every_other_shares_neighbors_as_sklearn_finds_them() -> None:
    states, probe_set = read()
    found = measure_geometry(states, probe_set, ("overlap_matrix",), K, torch.device("cpu"))
    matrices = {each.site: each.values for each in found.matrices if each.measure == "overlap"}
    pairs = {"last": ("picture/last", "text/last"), "image~text": ("picture/image", "text/text")}
    pairs |= {"picture": ("picture/last", "picture/last"), "token_last": ("picture_last/token", "text_last/token")}
    for site, (one, other) in pairs.items():
        rows, columns = ([near(x) for x in states.features[name]] for name in (one, other))
        expected = [[np.mean([len(p & q) / K for p, q in zip(a, b, strict=True)]) for b in columns] for a in rows]
        np.testing.assert_allclose(matrices[site].numpy(), np.array(expected), atol=1e-6)  # ratios of counts


def test_entropy_of_unit_rows_and_not_of_rows() -> None:
    states, probe_set = read()
    names = resolve_measures(["entropy", "entropy_unit_rows"])
    found = measure_geometry(states, probe_set, names, K, torch.device("cpu"))
    for layer in range(LAYERS):
        x = states.features["picture/last"][layer].double().numpy()
        x = x - x.mean(0)
        for measure, rows in (("entropy", x), ("entropy_unit_rows", x / np.linalg.norm(x, axis=1, keepdims=True))):
            share = np.linalg.eigvalsh(rows.T @ rows)
            share = share[share > 1e-12] / share[share > 1e-12].sum()
            expected = -(share * np.log(share)).sum() / np.log(min(x.shape))
            assert found.profile(measure, "picture")[layer - 1].value == pytest.approx(expected, rel=1e-5)


def test_svcca_keeps_the_variance_that_is_asked_for() -> None:
    states, probe_set = read()
    kept = {}
    for variance in (0.2, 0.45):
        found = measure_geometry(states, probe_set, ("svcca",), K, torch.device("cpu"), variance)
        kept[variance] = found.profile("svcca", "last")[0].k
        x = states.features["picture/last"][1].double().numpy()
        share = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
        directions = int((share.cumsum() / share.sum() < variance).sum()) + 1
        y = states.features["text/last"][1].double().numpy()
        share = np.linalg.svd(y - y.mean(0), compute_uv=False) ** 2
        assert kept[variance] == min(directions, int((share.cumsum() / share.sum() < variance).sum()) + 1)
    assert kept[0.2] < kept[0.45]  # type: ignore[operator]


def test_tokens_of_one_prompt_are_measured_where_they_were_read_and_not_missed_where_not() -> None:
    states, probe_set = read()
    found = measure_geometry(states, probe_set, ("token_cosine",), K, torch.device("cpu"))
    one, other = (states.features[f"{role}/token"][1].double().numpy() for role in ("picture_last", "text_last"))
    cosine = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert found.profile("token_cosine", "token_last")[0].value == pytest.approx(np.median(cosine), abs=1e-6)
    fewer = {role: sites for role, sites in ROLES.items() if not role.endswith("_last")}
    states, probe_set = read(fewer)
    found = measure_geometry(states, probe_set, ("token_cosine",), K, torch.device("cpu"))
    assert not found.profile("token_cosine", "token_last")
    assert not any("token_last" in problem for problem in found.problems)


def clips(seed: int, layers: int = 60, num: int = 20) -> SelectedRows:
    """Readings of clips of four frames that are much alike, with nothing in common with those of another seed.

    Each layer is drawn anew, so that the layers are repetitions of one experiment.
    """
    generator, frames = torch.Generator().manual_seed(seed), torch.arange(num).repeat_interleave(4)
    scene = torch.randn(layers, num, 8, generator=generator)[:, frames]
    x = 0.8**0.5 * scene + 0.2**0.5 * torch.randn(layers, 4 * num, 8, generator=generator) + 0.1
    rows = []
    for frame, clip in enumerate(frames.tolist()):
        kind = tuple(int(clip % 3 == place) for place in range(3))
        sample = Sample(f"{frame}", (Turn("user", "a cat"),), (Path(f"{frame}.png"),), "t")
        rows.append(ProbeRow(f"{frame}", str(clip), "picture", sample, "a cat", {"objects": kind}))
    return SelectedRows(x, tuple(rows), (0,) * len(rows), frames)


@pytest.mark.parametrize("measure", [*PAIR_MEASURES, "label_overlap"])
def test_frames_of_a_clip_are_not_taken_for_independent(measure: str) -> None:
    """Unrelated readings and labels of whole clips: values lie in the band of chance, and fill it as 95 % should.

    57 of 60 on average, less 4 binomial standard deviations; the median distance from chance is 0.34 of the band's half
    width for a normal law, less where few draws make a wide band, with a standard error of 0.05.
    """
    a, b = (PositionData.of(clips(seed), K, torch.device("cpu")) for seed in (0, 1))
    found = _object_overlap(a) if measure == "label_overlap" else PAIR_MEASURES[measure](a, b)
    assert found is not None
    known = [(e.value, e.null, e.null_low, e.null_high) for e in found]
    value, null, low, high = torch.tensor(known, dtype=torch.float64).T
    assert int(((value >= low) & (value <= high)).sum()) >= 50
    assert 0.15 < float(((value - null) / ((high - low) / 2)).abs().median()) < 0.55


def test_the_peak_says_between_which_layers_it_lies() -> None:
    """Overlap, CKA and dimension: on the row of the extreme, and on no other; layer -1 is the embeddings."""
    states, probe_set = read()
    for role in ("picture", "text"):  # the middle slice is where both are the same
        states.features[f"{role}/last"][1] = states.features["picture/last"][1]
    found = measure_geometry(states, probe_set, ("overlap", "cka", "id_gride", "gap"), K, torch.device("cpu"))
    for measure, site in (("overlap", "last"), ("cka", "last"), ("id_gride", "picture"), ("gap", "last")):
        summary = summarize_profile(found.profile(measure, site))
        assert summary is not None
        noted = {layer for layer, row in found.profile(measure, site).items() if noted_peak_range(row.notes)}
        assert noted == {summary.peak_layer}
        assert summary.peak_range is not None
        assert summary.peak_range[0] <= summary.peak_layer <= summary.peak_range[1]
        if measure != "id_gride":
            assert summary.peak_range == (0, 0)
    metrics = summary_metrics(found, ())
    assert (metrics["inside/cka/last/peak_low"], metrics["inside/cka/last/peak_high"]) == (0, 0)
