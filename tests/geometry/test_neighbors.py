"""Neighbours against scikit-learn, and what ties, copies and large means do to them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.representations import Representations


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def recall(features: Tensor, k: int = 30) -> float:
    """Share of the true neighbors, in float64, that are found."""
    truth = Neighbors.of(Representations.of(features.double()), k).indices
    found = Neighbors.of(Representations.of(features), k).indices
    return float((found[..., None] == truth[..., None, :]).any(-1).double().mean())


def test_as_scikit_learn() -> None:
    features = noise(2, 120, 7)
    near = Neighbors.of(Representations.of(features), 20)
    for layer, x in enumerate(features.double().numpy()):
        distances, indices = NearestNeighbors(n_neighbors=20).fit(x).kneighbors()
        assert (near.indices[layer].numpy() == indices).all()
        assert near.distances[layer].numpy() == pytest.approx(distances, rel=1e-5)  # float32 products


@pytest.mark.parametrize("width", [64, 576])
def test_a_dimension_with_a_large_mean_costs_nothing(width: int) -> None:
    """Uncentred float32 products keep 0.98 of the neighbors (measured); 0.999 leaves one pair in a thousand."""
    features = noise(1, 400, width)
    features[..., 3] += 1000
    assert recall(features) > 0.999
    rough = torch.cdist(features[0], features[0], compute_mode="use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    naive = rough.topk(30, largest=False).indices
    truth = Neighbors.of(Representations.of(features.double()), 30).indices[0]
    assert float((naive[..., None] == truth[:, None]).any(-1).double().mean()) < 0.995, "the test asks for nothing"


def test_ties_are_taken_in_the_order_of_the_samples() -> None:
    """Distances on a small integer lattice are exact, so a stable sort is the truth."""
    features = torch.randint(0, 4, (1, 90, 3), generator=torch.Generator().manual_seed(0)).float()
    squared = (features[0][:, None] - features[0]).square().sum(2).fill_diagonal_(torch.inf)
    order = squared.sort(stable=True)
    near = Neighbors.of(Representations.of(features), 12)
    assert torch.equal(near.indices[0].long(), order.indices[:, :12])
    tied = order.values[:, 11] == order.values[:, 12]
    assert torch.equal(near.num_tie_broken(12)[0] > 0, tied)
    assert torch.equal(near.num_tie_broken(5), Neighbors.of(Representations.of(features), 5).num_tie_broken(5))
    assert near.problem(0, 12).startswith("ties: ")


def test_two_places_only_is_no_agreement() -> None:
    """All neighbors are copies: index order chooses every one of them, and says nothing."""
    features = noise(1, 2, 8)[:, torch.arange(60) % 2]
    near = Neighbors.of(Representations.of(features), 20)
    assert float(near.distances.max()) == 0
    assert near.problem(0, 10) == "ties: 100% of the 10 nearest are chosen by index, not by distance"


def test_copies_are_at_distance_zero_and_counted() -> None:
    """A sampler's padding repeats rows; far from the mean, products alone would put the copies a little apart."""
    features = noise(2, 300, 200)
    features[:, :30] += 40
    padded = torch.cat([features, features[:, :17]], 1)
    near = Neighbors.of(Representations.of(padded), 10)
    assert near.duplicated.sum(1).tolist() == [17, 17]
    assert near.duplicated[0].nonzero().flatten().tolist() == list(range(300, 317))
    assert (near.distances[:, 300:, 0] == 0).all()
    assert near.notes(0, 10)[0] == "17 samples coincide with an earlier one"
    assert not Neighbors.of(Representations.of(features), 10).duplicated.any()


def test_copies_that_rounding_has_touched_are_copies() -> None:
    """The same row through another batch may differ in the last bit; a difference that can be seen is none of these."""
    features = noise(1, 100, 50) + 3
    touched, moved = features[:, :5].clone(), features[:, 5:10].clone()
    touched[..., ::7] = torch.nextafter(touched[..., ::7], torch.tensor(torch.inf))
    moved[..., 0] += 1e-3
    near = Neighbors.of(Representations.of(torch.cat([features, touched, moved], 1)), 10)
    assert near.duplicated[0].nonzero().flatten().tolist() == list(range(100, 105))
    assert near.distances[0, 105:, 0] == pytest.approx(torch.full((5,), 1e-3), rel=1e-3)


def test_close_pairs_keep_their_digits() -> None:
    """Two tight bunches far apart: float32 products lose the distances within a bunch, float64 ones do not."""
    features = noise(1, 200, 64) * 1e-3
    features[:, :100] += 5
    assert recall(features, 10) > 0.99
    exact = Neighbors.of(Representations.of(features.double()), 10).distances
    assert Neighbors.of(Representations.of(features), 10).distances == pytest.approx(
        exact, rel=1e-3
    )  # rounding of the input


def test_groups_are_no_neighbours_of_their_own() -> None:
    groups = torch.arange(60) // 3
    near = Neighbors.of(Representations.of(noise(1, 60, 4)), 64, groups=groups)
    assert near.indices.shape == (1, 60, 57)
    assert near.candidates.tolist() == [57] * 60
    assert not (groups[near.indices[0].long()] == groups[:, None]).any()
    classes = torch.arange(60) % 2
    expected = [sum(int(classes[j] == classes[i]) for j in range(60) if groups[j] != groups[i]) / 57 for i in range(60)]
    assert near.same_class_probability(classes).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_bad_layer_leaves_the_others_alone() -> None:
    features = noise(3, 40, 5)
    features[0], features[2, 7, 1] = 1.0, torch.nan
    near = Neighbors.of(Representations.of(features), 10)
    assert near.problem(0, 10) == "constant: all 40 samples coincide"
    assert near.problem(2, 10) == "not finite: 1 of 40 samples"
    assert torch.equal(near.indices[1], Neighbors.of(Representations.of(features[1:2]), 10).indices[0])
    assert near.problem(1, 11) == "too few: 11 neighbours asked for, 10 known"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(8, 30), d=st.integers(2, 6), scale=st.floats(1e-3, 1e3))
def test_order_scale_place_and_rotation_do_not_matter(seed: int, n: int, d: int, scale: float) -> None:
    x = noise(1, n, d, seed=seed).double()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(noise(d, d, seed=seed + 1).double()).Q
    near, moved = (Neighbors.of(Representations.of(each), 5) for each in (x, (scale * (x @ rotation + 3))[:, order]))
    assert torch.equal(order[moved.indices[0].long()], near.indices[0, order].long())
    assert moved.distances[0] == pytest.approx(scale * near.distances[0, order], rel=1e-6)  # of the closest pairs


def test_nothing_global_is_touched() -> None:
    state = torch.get_rng_state()
    with torch.inference_mode():
        Neighbors.of(Representations.of(noise(1, 30, 4).bfloat16()), 5)
    assert torch.equal(torch.get_rng_state(), state)
