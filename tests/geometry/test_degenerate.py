"""Measures of neighbours, spectra and gaps on data that cannot carry them: a reason, never a made-up number."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_mm.estimate import Estimate
from lightning_mm.geometry.dimension import gride, two_nn
from lightning_mm.geometry.divergence import frechet, mmd
from lightning_mm.geometry.gap import alignment, matched_cosine, modality_gap, token_cosine
from lightning_mm.geometry.gram import Bank
from lightning_mm.geometry.imbalance import information_imbalance
from lightning_mm.geometry.isotropy import anisotropy, median_cosine, uniformity
from lightning_mm.geometry.neighbours import Neighbours
from lightning_mm.geometry.overlap import label_overlap, overlap
from lightning_mm.geometry.separability import separability
from lightning_mm.geometry.spectrum import Spectrum, alpha_req, effective_rank, entropy, participation_ratio, rankme

MEASURES: dict[str, Callable[[Bank, Bank], list[Estimate]]] = {
    "overlap": lambda a, b: overlap(Neighbours.of(a), Neighbours.of(b), 5),
    "jaccard": lambda a, b: overlap(Neighbours.of(a), Neighbours.of(b), 5, score="jaccard"),
    "label_overlap": lambda a, b: label_overlap(Neighbours.of(a), torch.arange(a.num_samples) % 3, 5),
    "imbalance": information_imbalance,
    "imbalance_back": lambda a, b: information_imbalance(b, a),
    "two_nn": lambda a, b: two_nn(Neighbours.of(a)),
    "two_nn_ml": lambda a, b: two_nn(Neighbours.of(a), "ml"),
    "gride": lambda a, b: gride(Neighbours.of(a)),
    "participation_ratio": lambda a, b: participation_ratio(a),
    "participation_ratio_biased": lambda a, b: participation_ratio(a, debiased=False),
    "effective_rank": lambda a, b: effective_rank(Spectrum.of(a)),
    "entropy": lambda a, b: entropy(Spectrum.of(a)),
    "alpha_req": lambda a, b: alpha_req(Spectrum.of(a)),
    "rankme": lambda a, b: rankme(a),
    "anisotropy": lambda a, b: anisotropy(a),
    "median_cosine": lambda a, b: median_cosine(a),
    "uniformity": lambda a, b: uniformity(a),
    "alignment": alignment,
    "matched_cosine": matched_cosine,
    "token_cosine": token_cosine,
    "modality_gap": modality_gap,
    "modality_gap_relative": lambda a, b: modality_gap(a, b, relative=True),
    "separability": separability,
    "frechet": frechet,
    "mmd": mmd,
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MEASURES)
def test_a_layer_where_all_samples_coincide(name: str) -> None:
    """The last token of the embeddings is the same for every sample: undefined, with the reason, and never 1.0."""
    x, y = noise(3, 90, 120), noise(3, 90, 120, seed=1)
    for read in (x, y):
        read[0] = noise(1, 120, seed=2)
        read[2, 5, 3] = torch.nan
    constant, sound, broken = MEASURES[name](Bank.of(x), Bank.of(y))
    assert constant.undefined == "constant: all 90 samples coincide"
    assert broken.undefined == "not finite: 1 of 90 samples"
    assert sound.value is not None


@pytest.mark.parametrize("name", MEASURES)
def test_one_of_two_banks_is_constant(name: str) -> None:
    x, y = noise(1, 60, 120), torch.ones(1, 60, 120)
    found = MEASURES[name](Bank.of(x), Bank.of(y))[0]
    alone = MEASURES[name](Bank.of(x), Bank.of(x))[0]
    assert found == alone or found.undefined == "constant: all 60 samples coincide"


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("name", MEASURES)
def test_few_samples_are_no_crash(name: str, n: int) -> None:
    found = MEASURES[name](Bank.of(noise(2, n, 6)), Bank.of(noise(2, n, 6, seed=1)))
    assert len(found) == 2
    for estimate in found:
        assert estimate.undefined or n > 1
        assert all(end is None or end == end for end in (estimate.value, estimate.low, estimate.high, estimate.null))


@pytest.mark.parametrize("name", MEASURES)
def test_half_of_the_samples_are_copies(name: str) -> None:
    """Pairs of equal rows, as a sampler's padding makes them: a number or a reason, no crash, no infinity."""
    x, y = (noise(1, 60, 20, seed=s).repeat_interleave(2, 1) for s in (0, 1))
    found = MEASURES[name](Bank.of(x), Bank.of(y))[0]
    assert found.undefined or abs(found.value) < 1e6


@pytest.mark.parametrize("name", MEASURES)
def test_nothing_global_is_touched(name: str) -> None:
    """Neither the global generator nor the number of threads nor autograd; and the same again gives the same."""
    a, b = Bank.of(noise(1, 40, 30).requires_grad_()), Bank.of(noise(1, 40, 30, seed=1))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode():
            first = MEASURES[name](a, b)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert MEASURES[name](a, b) == first
