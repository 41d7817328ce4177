"""Measures of representations in NumPy, SciPy and scikit-learn, as their papers define them, one layer at a time.

An oracle of which measure is taken of which vectors: it shares no code with the package. Estimates alone; no intervals.

Data flow: (N, D) vectors of one layer, or two of the same samples, picture and caption -> a number.

Shapes: N samples, D features.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.linalg import orthogonal_procrustes, sqrtm, subspace_angles
from scipy.optimize import brentq
from scipy.spatial.distance import cdist, pdist, squareform
from scipy.stats import rankdata, spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

Rows = Any
"""(N, D) float64 array."""


def units(x: Rows) -> Rows:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def centered(x: Rows) -> Rows:
    return x - x.mean(0)


def nearest(x: Rows, k: int) -> Rows:
    """(N, k) indices of the nearest others."""
    return NearestNeighbors(n_neighbors=k).fit(x).kneighbors(return_distance=False)


def off_diagonal(matrix: Rows) -> Rows:
    return matrix[~np.eye(len(matrix), dtype=bool)]


def lower_median(values: Rows) -> float:
    """The median; of an even number of values the lower of the two in the middle."""
    return float(np.sort(values.ravel())[(values.size - 1) // 2])


def two_nn(x: Rows) -> float:
    """Facco et al. 2017: the line through the smallest 90 % of the ratios."""
    far = NearestNeighbors(n_neighbors=2).fit(x).kneighbors()[0]
    n = len(x)
    ratio = np.sort(np.log(far[:, 1] / far[:, 0]))[: int(0.9 * n)]
    cumulated = -np.log(1 - np.arange(1, len(ratio) + 1) / n)
    return float(ratio @ cumulated / (ratio @ ratio))


def scales(n: int) -> tuple[int, int]:
    """Neighbors 16 and 32, or half an eighth and an eighth of the samples."""
    far = min(32, max(2, n // 8))
    return far // 2, far


def gride(x: Rows) -> float:
    """Denti et al. 2022: the root of the score, with N - 1 for N."""
    near, far = scales(len(x))
    distance = NearestNeighbors(n_neighbors=far).fit(x).kneighbors()[0]
    mu = np.log(distance[:, far - 1] / distance[:, near - 1])

    def score(d: float) -> float:
        inner = (mu / -np.expm1(-d * mu)).sum()
        return float((len(x) - 1) / d + (far - near - 1) * inner - (far - 1) * mu.sum())

    return float(brentq(score, 1e-3, 1e5))


@cache
def _gride_of_noise(n: int) -> tuple[list[float], list[float]]:
    """Dimensions of Gaussian clouds, and what ``gride`` says of them: means over two clouds."""
    true, told = [0.0], [0.0]
    for d in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256):
        clouds = torch.randn(2, n, d, generator=torch.Generator().manual_seed(d)).double().numpy()
        estimate = float(np.mean([gride(cloud) for cloud in clouds]))
        if estimate > told[-1]:
            true.append(float(d))
            told.append(estimate)
    return true, told


def calibrated_gride(x: Rows) -> float:
    """The dimension of the Gaussian cloud that gets this estimate; fewer than 100 samples are not rounded."""
    assert len(x) < 100
    true, told = _gride_of_noise(len(x))
    return float(np.interp(gride(x), told, true))


def u_centered(gram: Rows) -> Rows:
    """Szekely and Rizzo 2014."""
    n, off = len(gram), gram - np.diag(np.diag(gram))
    rows = off.sum(1, keepdims=True) / (n - 2)
    off = off - rows - rows.T + off.sum() / ((n - 1) * (n - 2))
    return off - np.diag(np.diag(off))


def participation_ratio(x: Rows) -> float:
    """(tr S)^2 over tr S^2, each by its unbiased estimate."""
    n, squared = len(x), squareform(pdist(x, "sqeuclidean"))
    fourfold = squared.sum() ** 2 - 4 * (squared.sum(1) ** 2).sum() + 2 * (squared**2).sum()
    trace_squared = fourfold / (n * (n - 1) * (n - 2) * (n - 3)) / 4
    gram = u_centered(centered(x) @ centered(x).T)
    return float(trace_squared / ((gram**2).sum() / (n * (n - 3))))


def entropy_of(shares: Rows) -> float:
    shares = shares[shares > 1e-13 * shares.max()] / shares.sum()
    return float(-(shares * np.log(shares)).sum())


def eigenvalues(x: Rows) -> Rows:
    return np.linalg.svd(x, compute_uv=False) ** 2


def entropy(x: Rows) -> float:
    return entropy_of(eigenvalues(centered(x))) / float(np.log(min(x.shape)))


def rankme(x: Rows) -> float:
    """Garrido et al. 2023: 1e-7 is added to each share."""
    shares = np.linalg.svd(x, compute_uv=False)
    shares = shares / shares.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


def alpha_req(x: Rows) -> float:
    values = eigenvalues(centered(x))[10:100]
    values = values[: len(x) - 1 - 10]
    return -float(np.polyfit(np.log(np.arange(11, 11 + len(values))), np.log(values), 1)[0])


SINGLE: Mapping[str, Callable[[Rows], float]] = {
    "id_twonn": two_nn,
    "id_gride": gride,
    "id_calibrated": calibrated_gride,
    "participation_ratio": participation_ratio,
    "effective_rank": lambda x: float(np.exp(entropy_of(np.linalg.svd(centered(x), compute_uv=False)))),
    "rankme": rankme,
    "entropy": entropy,
    "entropy_unit_rows": lambda x: entropy_of(eigenvalues(units(centered(x)))) / float(np.log(min(x.shape))),
    "alpha_req": alpha_req,
    "anisotropy": lambda x: float(off_diagonal(units(x) @ units(x).T).mean()),
    "uniformity": lambda x: float(np.log(np.exp(-2 * pdist(units(x), "sqeuclidean")).mean())),
}
"""Of one position."""


def cosines(before: Rows, after: Rows) -> Rows:
    return (units(before) * units(after)).sum(1)


BLOCK: Mapping[str, Callable[[Rows, Rows], float]] = {
    "block_influence": lambda before, after: 1 - float(cosines(before, after).mean()),
    "angular_distance": lambda before, after: float(np.arccos(cosines(before, after)).mean() / np.pi),
}
"""Of what enters a block and what leaves it."""


def overlap(a: Rows, b: Rows, k: int) -> float:
    pairs = zip(nearest(a, k), nearest(b, k), strict=True)
    return float(np.mean([len(set(one) & set(other)) / k for one, other in pairs]))


def label_overlap(x: Rows, labels: Rows, k: int) -> float:
    return float((labels[nearest(x, k)] == labels[:, None]).mean())


def debiased_cka(k: Rows, m: Rows) -> float:
    k, m = u_centered(k), u_centered(m)
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def gram(x: Rows) -> Rows:
    return centered(x) @ centered(x).T


def cka(a: Rows, b: Rows) -> float:
    return debiased_cka(gram(a), gram(b))


def cka_biased(a: Rows, b: Rows) -> float:
    return float((gram(a) * gram(b)).sum() / np.linalg.norm(gram(a)) / np.linalg.norm(gram(b)))


def cka_rbf(a: Rows, b: Rows) -> float:
    def kernel(x: Rows) -> Rows:
        squared = squareform(pdist(x, "sqeuclidean"))
        return np.exp(-squared / (2 * lower_median(off_diagonal(squared))))

    return debiased_cka(kernel(a), kernel(b))


def directions(x: Rows, variance: float) -> Rows:
    """(N, R) orthonormal scores: as many as hold the variance, at most a tenth of the samples."""
    scores, values, _ = np.linalg.svd(centered(x), full_matrices=False)
    wanted = int((np.cumsum(values**2) / (values**2).sum() < variance).sum()) + 1
    return scores[:, : min(wanted, len(x) // 10)]


def svcca(a: Rows, b: Rows, variance: float = 0.99) -> float:
    one, other = directions(a, variance), directions(b, variance)
    return float(np.cos(subspace_angles(one, other)).mean())


def pwcca(a: Rows, b: Rows) -> float:
    """Morcos et al. 2018: weighted by how much of ``a`` each variate accounts for."""
    one, other = directions(a, 1.0), directions(b, 1.0)
    left, rho, _ = np.linalg.svd(one.T @ other)
    weights = np.abs(centered(a).T @ (one @ left)).sum(0)
    return float((weights / weights.sum() * rho).sum())


def procrustes(a: Rows, b: Rows) -> float:
    a, b = centered(a) / np.linalg.norm(centered(a)), centered(b) / np.linalg.norm(centered(b))
    return float(orthogonal_procrustes(a, b)[1])


def distance_correlation(a: Rows, b: Rows) -> float:
    """Szekely et al. 2007, biased, of rows of length 1."""

    def doubly(x: Rows) -> Rows:
        d = squareform(pdist(units(x)))
        return d - d.mean(0) - d.mean(1, keepdims=True) + d.mean()

    a, b = doubly(a), doubly(b)
    return float(np.sqrt((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())))


def id_correlation(a: Rows, b: Rows) -> float:
    """Basile et al. 2025, equation 3: the dimensions of both less that of both side by side, features at variance 1."""
    a, b = (centered(x) / (x.std(0, ddof=1) + 1e-9) for x in (a, b))
    first, second = two_nn(a), two_nn(b)
    return float((first + second - two_nn(np.concatenate([a, b], 1))) / max(first, second))


def imbalance(a: Rows, b: Rows) -> float:
    """Glielmo et al. 2022: 2 / N times the mean rank in b of the nearest in a."""
    distance = squareform(pdist(b))
    np.fill_diagonal(distance, np.inf)
    ranks = rankdata(distance, axis=1)
    return float(2 / len(a) * ranks[np.arange(len(a)), nearest(a, 1)[:, 0]].mean())


def blocks(groups: Rows, count: int) -> list[Rows]:
    """Random blocks of whole groups, of nearly equal size: a group goes where its middle sample falls."""
    _, group = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group)
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0)).numpy()
    middle = np.cumsum(sizes[order]) - (sizes[order] + 1) // 2
    block = np.empty_like(order)
    block[order] = middle * min(count, len(sizes)) // len(groups)
    return [np.flatnonzero(block[group] == each) for each in np.unique(block[group])]


def gap_auc(a: Rows, b: Rows, groups: Rows) -> float:
    """Held-out AUROC of ridge regression on the modality, over five folds of whole groups."""
    middle = (a.mean(0) + b.mean(0)) / 2
    rows, target = np.concatenate([a, b]) - middle, np.repeat([-1.0, 1.0], len(a))
    penalty, total = float((rows**2).sum(1).mean()), 0.0
    for part in blocks(groups, 5):
        test = np.concatenate([part, len(a) + part])
        rest = np.setdiff1d(np.arange(2 * len(a)), test)
        scores = Ridge(alpha=penalty, fit_intercept=False).fit(rows[rest], target[rest]).predict(rows[test])
        total += roc_auc_score(target[test], scores) * len(part) / len(a)
    return total


def matched_cosine(a: Rows, b: Rows, groups: Rows) -> float:
    cosine = units(a) @ units(b).T
    return float(np.diag(cosine).mean() - cosine[groups[:, None] != groups].mean())


def frechet(a: Rows, b: Rows) -> float:
    """Dowson and Landau 1982; of at most 64 features, all count."""
    assert a.shape[1] <= 64
    one, other = np.cov(a.T), np.cov(b.T)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + other - 2 * sqrtm(one @ other).real))


def mmd(a: Rows, b: Rows) -> float:
    """Gretton et al. 2012, unbiased over pairs i != j; the bandwidth is the median of all distances."""
    parts = [cdist(x, y, "sqeuclidean") for x, y in ((a, a), (b, b), (a, b))]
    width = lower_median(np.concatenate([part.ravel() for part in parts]))
    near_a, near_b, across = (np.exp(-part / (2 * width)) for part in parts)
    return float(off_diagonal(near_a + near_b - across - across.T).mean())


PAIR: Mapping[str, Callable[[Rows, Rows, Rows, int], float]] = {
    "overlap": lambda a, b, groups, k: overlap(a, b, k),
    "cka": lambda a, b, groups, k: cka(a, b),
    "cka_rbf": lambda a, b, groups, k: cka_rbf(a, b),
    "cka_biased": lambda a, b, groups, k: cka_biased(a, b),
    "svcca": lambda a, b, groups, k: svcca(a, b),
    "pwcca": lambda a, b, groups, k: pwcca(a, b),
    "procrustes": lambda a, b, groups, k: procrustes(a, b),
    "distance_correlation": lambda a, b, groups, k: distance_correlation(a, b),
    "id_correlation": lambda a, b, groups, k: id_correlation(a, b),
    "rsa": lambda a, b, groups, k: float(spearmanr(pdist(a), pdist(b)).statistic),
    "imbalance_image_to_text": lambda a, b, groups, k: imbalance(a, b),
    "imbalance_text_to_image": lambda a, b, groups, k: imbalance(b, a),
    "alignment": lambda a, b, groups, k: float(((units(a) - units(b)) ** 2).sum(1).mean()),
    "gap": lambda a, b, groups, k: float(np.linalg.norm(units(a).mean(0) - units(b).mean(0))),
    "gap_auc": lambda a, b, groups, k: gap_auc(a, b, groups),
    "matched_cosine": lambda a, b, groups, k: matched_cosine(a, b, groups),
    "token_cosine": lambda a, b, groups, k: float(np.median(cosines(a, b))),
    "frechet": lambda a, b, groups, k: frechet(a, b),
    "mmd": lambda a, b, groups, k: mmd(a, b),
}
"""Of picture and caption, sample by sample, with the samples' groups and the number of neighbors."""
