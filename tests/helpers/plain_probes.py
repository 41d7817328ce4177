"""The probing protocol in NumPy and scikit-learn: folds of whole groups, C by a validation fold, scores of the others.

An oracle of which probe is fitted to which vectors and labels: it shares no code with the package. Estimates alone.

Data flow: (N, D) vectors of one layer, labels and groups -> folds -> for each test fold, the C that the next fold
prefers after training on the other three -> refitted on those four -> the pooled score.

Shapes: N samples, D features, A labels.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

FOLDS = 5
_MASK = (1 << 64) - 1


def uniform(number: int, seed: int) -> float:
    """A number in [0, 1) for an id: splitmix64 (Steele et al. 2014)."""
    z = (number * 0x9E3779B97F4A7C15 + (seed + 1) * 0x632BE5AB) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return (z >> 11) / (1 << 53)


def indicators(labels: Any) -> Any:
    """(N, A) 0 or 1."""
    return labels if labels.ndim == 2 else (labels[:, None] == np.arange(labels.max() + 1)).astype(int)


def folds(labels: Any, groups: Any, seed: int = 0) -> Any:
    """(N,) fold: groups in the order of their labels, rare ones first, then of a hash, dealt out in turn."""
    ids, group = np.unique(groups, return_inverse=True)
    held = np.zeros((len(ids), indicators(labels).shape[1]), dtype=int)
    np.add.at(held, group, indicators(labels))
    rare_first = np.argsort((held > 0).sum(0), kind="stable")
    keys = [(tuple(held[g][rare_first]), uniform(int(ids[g]), seed)) for g in range(len(ids))]
    fold = np.empty(len(ids), dtype=int)
    fold[sorted(range(len(ids)), key=lambda g: keys[g])] = np.arange(len(ids)) % FOLDS
    return fold[group]


def control_labels(labels: Any, types: Any, seed: int = 0) -> Any:
    """Labels drawn by their frequencies, one for each type (Hewitt and Liang 2019)."""
    values, counts = np.unique(labels, axis=0, return_counts=True)
    heights = np.cumsum(counts) / counts.sum()
    drawn = [np.searchsorted(heights, uniform(int(each), seed), side="right") for each in types]
    return values[np.minimum(drawn, len(values) - 1)]


def _fitted(x: Any, y: Any, c: float) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-7, max_iter=2000)).fit(x, y)


def _tasks(labels: Any) -> list[Any]:
    return [labels] if labels.ndim == 1 else list(labels.T)


def _predictions(x: Any, labels: Any, groups: Any) -> Iterator[tuple[Any, list[Any]]]:
    """The samples of each test fold, and (n, K) log-probabilities of each task."""
    fold = folds(labels, groups)
    for test in range(FOLDS):
        tested, judged = fold == test, fold == (test + 1) % FOLDS
        train, gains = ~(tested | judged), []
        grid = [value / x.shape[1] for value in (0.1, 1.0, 10.0, 100.0)]
        for c in grid:
            told = [_fitted(x[train], y[train], c).predict_log_proba(x[judged]) for y in _tasks(labels)]
            own = zip(told, _tasks(labels), strict=True)
            gains.append(sum(log_p[np.arange(judged.sum()), y[judged]].sum() for log_p, y in own))
        best = grid[int(np.argmax(gains))]
        yield (
            np.flatnonzero(tested),
            [_fitted(x[~tested], y[~tested], best).predict_log_proba(x[tested]) for y in _tasks(labels)],
        )


def accuracy(x: Any, labels: Any, groups: Any) -> float:
    """Of class ids (N,)."""
    right = [log_p.argmax(1) == labels[rows] for rows, (log_p,) in _predictions(x, labels, groups)]
    return float(np.concatenate(right).mean())


def auroc(x: Any, labels: Any, groups: Any) -> float:
    """Of labels (N, A): the mean over labels of the share of ranked pairs, pairs within a fold only."""
    right, pairs = np.zeros(labels.shape[1]), np.zeros(labels.shape[1])
    for rows, told in _predictions(x, labels, groups):
        for task, log_p in enumerate(told):
            score, positive = log_p[:, 1] - log_p[:, 0], labels[rows, task] == 1
            apart = score[positive][:, None] - score[~positive]
            right[task] += (apart > 0).sum() + (apart == 0).sum() / 2
            pairs[task] += apart.size
    return float((right / pairs).mean())


def score(x: Any, labels: Any, groups: Any) -> float:
    """The main score: accuracy of classes, AUROC of labels."""
    return accuracy(x, labels, groups) if labels.ndim == 1 else auroc(x, labels, groups)
