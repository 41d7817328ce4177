"""Measures of neighbors, spectra and gaps on data that cannot carry them: a reason, never a made-up number."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.cca import pwcca, svcca
from lightning_mm.geometry.cka import cka, cka_biased, cka_rbf
from lightning_mm.geometry.divergence import frechet, mmd
from lightning_mm.geometry.information_imbalance import information_imbalance
from lightning_mm.geometry.intrinsic_dimension import gride, two_nn
from lightning_mm.geometry.isotropy import anisotropy, median_cosine, uniformity
from lightning_mm.geometry.knn_overlap import label_overlap, overlap
from lightning_mm.geometry.modality_gap import alignment, matched_cosine, modality_gap, token_cosine
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.procrustes import procrustes
from lightning_mm.geometry.representations import Representations
from lightning_mm.geometry.rsa import rsa
from lightning_mm.geometry.separability import separability
from lightning_mm.geometry.spectrum import Spectrum, alpha_req, effective_rank, entropy, participation_ratio, rankme

Measure = Callable[[Representations, Representations, Tensor | None], list[Estimate]]

ALONE: dict[str, Measure] = {
    "label_overlap": lambda a, b, g: label_overlap(Neighbors.of(a), torch.arange(a.num_samples) % 3, 5, g),
    "two_nn": lambda a, b, g: two_nn(Neighbors.of(a), groups=g),
    "two_nn_ml": lambda a, b, g: two_nn(Neighbors.of(a), "ml", groups=g),
    "gride": lambda a, b, g: gride(Neighbors.of(a), groups=g),
    "participation_ratio": lambda a, b, g: participation_ratio(a, groups=g),
    "participation_ratio_biased": lambda a, b, g: participation_ratio(a, debiased=False, groups=g),
    "effective_rank": lambda a, b, g: effective_rank(Spectrum.of(a), g),
    "entropy": lambda a, b, g: entropy(Spectrum.of(a), g),
    "alpha_req": lambda a, b, g: alpha_req(Spectrum.of(a), groups=g),
    "rankme": lambda a, b, g: rankme(a, g),
    "anisotropy": lambda a, b, g: anisotropy(a, g),
    "median_cosine": lambda a, b, g: median_cosine(a, g),
    "uniformity": lambda a, b, g: uniformity(a, groups=g),
}
"""Measures of the first reps."""

TOGETHER: dict[str, Measure] = {
    "overlap": lambda a, b, g: overlap(Neighbors.of(a), Neighbors.of(b), 5, g),
    "jaccard": lambda a, b, g: overlap(Neighbors.of(a), Neighbors.of(b), 5, g, score="jaccard"),
    "imbalance": lambda a, b, g: information_imbalance(a, b, groups=g),
    "imbalance_back": lambda a, b, g: information_imbalance(b, a, groups=g),
    "alignment": alignment,
    "matched_cosine": matched_cosine,
    "token_cosine": token_cosine,
    "modality_gap": modality_gap,
    "modality_gap_relative": lambda a, b, g: modality_gap(a, b, g, relative=True),
    "separability": separability,
    "frechet": lambda a, b, g: frechet(a, b, groups=g),
    "mmd": mmd,
    "cka": cka,
    "cka_rbf": lambda a, b, g: cka_rbf(a, b, groups=g),
    "cka_biased": cka_biased,
    "svcca": lambda a, b, g: svcca(a, b, groups=g),
    "pwcca": pwcca,
    "procrustes": procrustes,
    "rsa": lambda a, b, g: rsa(a, b, groups=g),
}
MEASURES = ALONE | TOGETHER

USE_GROUPS = ("matched_cosine", "separability")
"""Groups say which samples are different, and which stay in one fold."""

RANGES = {
    "two_nn": (5, 25),
    "two_nn_ml": (5, 25),
    "gride": (5, 25),
    "participation_ratio": (10, 30),
    "participation_ratio_biased": (10, 20),
    "effective_rank": (10, 20),
    "rankme": (10, 20),
    "alpha_req": (0, 3),
    "uniformity": (-4, 0),
    "alignment": (0, 4),
    "imbalance": (0, 2),
    "imbalance_back": (0, 2),
    "modality_gap": (0, 2),
    "modality_gap_relative": (0, 2),
    "frechet": (0, 40),
    "mmd": (-0.1, 0.1),
}
"""What 60 unit Gaussian samples of 20 features, each twice, can give; shares and cosines are between -1 and 1."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MEASURES)
def test_a_layer_where_all_samples_coincide(name: str) -> None:
    """The last token of the embeddings is the same for every sample: undefined, with the reason, and never 1.0."""
    x, y = noise(3, 90, 120), noise(3, 90, 120, seed=1)
    for read in (x, y):
        read[0] = noise(1, 120, seed=2)
        read[2, 5, 3] = torch.nan
    constant, sound, broken = MEASURES[name](Representations.of(x), Representations.of(y), None)
    assert constant.undefined == "constant: all 90 samples coincide"
    assert broken.undefined == "not finite: 1 of 90 samples"
    assert sound.value is not None


@pytest.mark.parametrize("name", TOGETHER)
def test_one_of_two_banks_is_constant(name: str) -> None:
    sound, constant = Representations.of(noise(1, 60, 120)), Representations.of(torch.ones(1, 60, 120))
    for pair in ((sound, constant), (constant, sound)):
        assert TOGETHER[name](*pair, None)[0].undefined == "constant: all 60 samples coincide"


@pytest.mark.parametrize("name", MEASURES)
def test_one_group_and_one_sample_beside_it(name: str) -> None:
    """Nothing is left to leave out, to exchange or to compare with: a number without interval, or a reason."""
    a, b = Representations.of(noise(1, 60, 120)), Representations.of(noise(1, 60, 120, seed=1))
    free = MEASURES[name](a, b, None)[0]
    for groups in (torch.zeros(60), torch.tensor([0] * 59 + [1])):
        found = MEASURES[name](a, b, groups)[0]
        assert (found.low, found.high) == (None, None)
        assert found.undefined.startswith("one group") or found.value == free.value or name in USE_GROUPS
        if name in TOGETHER and not found.undefined:
            assert (found.null_low, found.null_high) == (None, None)
            assert found.null in (None, 0.5 if name == "separability" else 0.0)
            assert any(note.startswith("chance is not drawn: ") for note in found.notes)


@pytest.mark.parametrize("name", MEASURES)
def test_groups_of_two_have_interval_and_chance(name: str) -> None:
    found = MEASURES[name](
        Representations.of(noise(1, 60, 120)), Representations.of(noise(1, 60, 120, seed=1)), torch.arange(60) // 2
    )[0]
    assert found.low <= found.value <= found.high
    assert found.null is not None
    assert name in ALONE or found.null_low < found.null_high


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("name", MEASURES)
def test_few_samples_are_no_crash(name: str, n: int) -> None:
    found = MEASURES[name](Representations.of(noise(2, n, 6)), Representations.of(noise(2, n, 6, seed=1)), None)
    assert len(found) == 2
    for estimate in found:
        assert estimate.undefined or n > 1
        assert all(end is None or end == end for end in (estimate.value, estimate.low, estimate.high, estimate.null))


@pytest.mark.parametrize("name", MEASURES)
def test_half_of_the_samples_are_copies(name: str) -> None:
    """Pairs of equal rows, as a sampler's padding makes them: a number or a reason, no crash, no infinity."""
    x, y = (noise(1, 60, 20, seed=s).repeat_interleave(2, 1) for s in (0, 1))
    pairs = torch.arange(120) // 2
    for groups in (None, pairs):
        found = MEASURES[name](Representations.of(x), Representations.of(y), groups)[0]
        least, most = RANGES.get(name, (-1, 1))
        assert found.undefined.startswith(("too few", "no bandwidth")) or least <= found.value <= most + 1e-6
        assert None in (found.low, found.high) or found.low <= found.value <= found.high + 1e-6


@pytest.mark.parametrize("name", MEASURES)
def test_nothing_global_is_touched(name: str) -> None:
    """Neither the global generator nor the number of threads nor autograd; and the same again gives the same."""
    a, b = Representations.of(noise(1, 40, 30).requires_grad_()), Representations.of(noise(1, 40, 30, seed=1))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode():
            first, again = MEASURES[name](a, b, None), MEASURES[name](a, b, None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert again == first
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    # On some CPUs a matrix product adds in another order with another number of threads: float32's rounding.
    for one, other in zip(MEASURES[name](a, b, None), first, strict=True):
        assert (one.undefined, one.n, one.k, one.notes) == (other.undefined, other.n, other.k, other.notes)
        for field in ("value", "low", "high", "null", "null_low", "null_high"):
            there = getattr(other, field)
            assert getattr(one, field) == (there if there is None else pytest.approx(there, rel=1e-5, abs=1e-7)), field
