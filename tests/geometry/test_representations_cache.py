"""A reps's Gram matrices and distances: exact where samples are close, and no more of them held than there is room."""

import pytest
import torch
from torch import Tensor

from lightning_mm.geometry import representations
from lightning_mm.geometry.cka import cka_matrix
from lightning_mm.geometry.representations import Representations, cross_distances


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_distances_are_those_of_float64_also_within_close_clusters() -> None:
    """1e-4 relative: float32 features as they are, whatever lies between the clusters."""
    x = 1e-3 * noise(2, 60, 16)
    x[0] *= 1e3
    x[1, :30] += 5
    x[1, 7] = x[1, 6]
    reps = Representations.of(x)
    for layer in range(2):
        exact = torch.cdist(reps.centered[layer].double(), reps.centered[layer].double()).square()
        torch.testing.assert_close(reps.squared_distances(layer).double(), exact, rtol=1e-4, atol=1e-13)
    assert float(reps.squared_distances(1)[6, 7]) == 0
    exact = torch.cdist(x[1].double(), x[1, :20].double()).square()
    torch.testing.assert_close(cross_distances(x[1], x[1, :20]).double(), exact, rtol=1e-4, atol=1e-13)


def test_what_is_held_has_a_bound_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(5, 40, 8)
    x[3, 2] = x[3, 1]
    roomy = Representations.of(x)
    expected = [(roomy.gram(layer), roomy.squared_distances(layer)) for layer in range(5)]
    assert len(roomy._cache) == 6, "five Gram matrices, and the distances that float32 would lose"
    assert roomy.gram(2).data_ptr() == roomy.gram(2).data_ptr()
    monkeypatch.setattr(representations, "_CACHE_BYTES", 2 * 40 * 40 * 4)
    narrow = Representations.of(x)
    for layer, (products, distances) in enumerate(expected):
        torch.testing.assert_close(narrow.gram(layer), products, rtol=0, atol=0)
        torch.testing.assert_close(narrow.squared_distances(layer), distances, rtol=0, atol=0)
    assert len(narrow._cache) == 2
    torch.testing.assert_close(narrow.gram(4, slice(3, 9)), expected[4][0][3:9])
    torch.testing.assert_close(cka_matrix(narrow), cka_matrix(roomy))


def test_all_layers_together_take_little_more_than_their_gram_matrices() -> None:
    """12 layers of 300: one L x N x N tensor, and a few N x N ones at a time."""
    reps = Representations.of(noise(12, 300, 4))
    with torch.profiler.profile(profile_memory=True) as profiled:
        for layer in range(12):
            reps.squared_distances(layer)
    assert sum(held.nbytes for held in reps._cache.values()) == 12 * 300 * 300 * 4
    assert max(event.self_cpu_memory_usage for event in profiled.events()) <= 2 * 300 * 300 * 4
