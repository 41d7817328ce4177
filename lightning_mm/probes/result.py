"""Scores of a probe's held-out predictions, with intervals and chance levels, and the result over all layers.

Scores of classes: accuracy (null: the majority class), balanced_accuracy, macro_f1, nll (nats; null: the entropy of the
classes), information (bits of V-information; null: 0), calibration_error. Scores of labels, as means over the labels:
auroc, balanced_accuracy (predicted present where likelier than in training), average_precision (null: the frequency of
the labels).

Data flow: ``HeldOutPredictions`` (of ``CrossValPredictions``) + true labels + groups -> ``ScoreSummary`` of a block of
layers -> ``ProbeResult``, joined over blocks -> ``analysis.probing``.

Shapes: L layers, M tested samples, A labels, K classes, F test folds, B bootstrap draws.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate, values
from lightning_mm.probes import intervals, scores
from lightning_mm.probes.cross_validation import bootstrap_weights, num_groups

MULTINOMIAL_SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "nll", "information", "calibration_error")
MULTILABEL_SCORES = ("auroc", "balanced_accuracy", "average_precision")
"""Names of the scores; the first is the main one."""

_DRAWS = 1000
"""Bootstrap draws of the intervals."""

_CHANCE_DRAWS = 200
"""Label permutations of the null."""

_RANGES = {"nll": (0.0, math.inf), "information": (-math.inf, math.inf)}
"""Ranges of scores that are not in [0, 1]."""

LayerEstimates = list[Estimate]
"""One Estimate per layer."""

Score = Callable[[Tensor | None], Tensor]
"""(B, M) sample weights -> scores (L, B); None -> scores (L,)."""


@dataclass(frozen=True, eq=False)
class HeldOutPredictions:
    """Predictions of one target for M tested samples.

    Args:
        log_p: (L, A, M, K) log-probabilities; A is 1 for classes, K is 2 for labels.
        frequency: (A, M, K) class frequencies in training.
        truth: (A, M) class ids.
        fold: (M,) test fold of each sample: the samples of one fold are predicted by one set of probes.
        groups: (M,) group ids.
    """

    log_p: Tensor
    frequency: Tensor
    truth: Tensor
    fold: Tensor
    groups: Tensor

    @property
    def null_inflation(self) -> float:
        """Factor on the standard deviation of cross-fitted scores under the null, against a single test fold.

        Under the null a linear probe is right about a sample as far as others of its label resemble it. Cross-fitted,
        each pair of samples contributes twice, once each way: twice the variance.
        """
        return 1.0 if len(torch.unique(self.fold)) == 1 else math.sqrt(2)


@dataclass(frozen=True, eq=False)
class ScoreSummary:
    """Scores of all layers.

    Args:
        scores: One Estimate per layer, by name.
        draws: (L, B) bootstrap draws of the main score.
        p_values: Per layer, probability of a main score as high under the null.
    """

    scores: dict[str, LayerEstimates]
    draws: Tensor
    p_values: list[float]


def multiclass_scores(tested: HeldOutPredictions, seed: int) -> ScoreSummary:
    """Scores of one task with K classes; ``seed`` is that of the bootstrap."""
    log_p_LMK, labels_M = tested.log_p[:, 0], tested.truth[0]
    predicted_LM, (n, k) = log_p_LMK.argmax(2), log_p_LMK.shape[1:]
    share_K = torch.bincount(labels_M, minlength=k).double() / n
    majority, entropy = float(share_K.max()), float(torch.special.entr(share_K).sum())
    # Samples of a group with the same label are predicted alike, right or wrong: they are one trial.
    trials = torch.unique(torch.stack([tested.groups.to(labels_M.device), labels_M]), dim=1).shape[1]
    spread = tested.null_inflation * math.sqrt(majority * (1 - majority) / trials)
    table = {
        "accuracy": partial(scores.accuracy, predicted_LM, labels_M),
        "balanced_accuracy": partial(scores.balanced_accuracy, predicted_LM, labels_M, k),
        "macro_f1": partial(scores.macro_f1, predicted_LM, labels_M, k),
        "nll": partial(scores.nll, log_p_LMK, labels_M),
        "information": partial(scores.v_information, log_p_LMK, labels_M),
        "calibration_error": partial(scores.calibration_error, log_p_LMK, labels_M),
    }
    nulls = {
        "accuracy": intervals.normal_null_band(majority, spread),
        "balanced_accuracy": {"null": 1 / k},
        "nll": {"null": entropy},
        "information": {"null": 0.0},
    }
    found, draws_LB = _estimates(table, [nulls] * len(log_p_LMK), tested, k, seed)
    return ScoreSummary(found, draws_LB, [intervals.p_value(v, majority, spread) for v in values(found["accuracy"])])


def multilabel_scores(tested: HeldOutPredictions, seed: int) -> ScoreSummary:
    """Means over A labels of the scores of each; ``seed`` is that of the bootstrap and of the null."""
    score_LAM = tested.log_p[..., 1] - tested.log_p[..., 0]
    called_LAM = (tested.log_p[..., 1] > tested.frequency[..., 1].log()).long()
    by_fold = {"strata_N": tested.fold}
    table = {
        "auroc": _label_mean(partial(scores.auroc, **by_fold), score_LAM, tested.truth),
        "balanced_accuracy": _label_mean(partial(scores.balanced_accuracy, num_classes=2), called_LAM, tested.truth),
        "average_precision": _label_mean(partial(scores.average_precision, **by_fold), score_LAM, tested.truth),
    }
    permuted = partial(intervals.permuted_auroc, truth_AN=tested.truth, strata_N=tested.fold, groups_N=tested.groups)
    ranked_L, called_L = (
        (permuted(found.float(), draws=_CHANCE_DRAWS, seed=seed).std(1) * tested.null_inflation).tolist()
        for found in (score_LAM, called_LAM)
    )
    frequent = {"null": float(tested.truth.double().mean())}
    nulls = [
        {
            "auroc": intervals.normal_null_band(0.5, ranked),
            "balanced_accuracy": intervals.normal_null_band(0.5, called),
            "average_precision": frequent,
        }
        for ranked, called in zip(ranked_L, called_L, strict=True)
    ]
    found, draws_LB = _estimates(table, nulls, tested, len(tested.truth), seed)
    pairs = zip(values(found["auroc"]), ranked_L, strict=True)
    return ScoreSummary(found, draws_LB, [intervals.p_value(value, 0.5, spread) for value, spread in pairs])


def _label_mean(score: Callable[..., Tensor], values_LAM: Tensor, truth_AM: Tensor) -> Score:
    """The mean of a score over the labels, as a function of the sample weights."""

    def mean(weights: Tensor | None) -> Tensor:
        pairs = zip(values_LAM.unbind(1), truth_AM, strict=True)
        return torch.stack([score(values_LM, truth_M, weights=weights) for values_LM, truth_M in pairs]).nanmean(0)

    return mean


def _estimates(
    table: Mapping[str, Score],
    nulls: Sequence[Mapping[str, dict[str, float]]],
    tested: HeldOutPredictions,
    k: int,
    seed: int,
) -> tuple[dict[str, LayerEstimates], Tensor]:
    """Every score with its interval and each layer's null fields, and the bootstrap draws of the first score."""
    weights_BM = bootstrap_weights(tested.groups, _DRAWS, seed).to(tested.fold.device)
    draws = {name: score(weights_BM) for name, score in table.items()}
    found, groups = {}, num_groups(tested.groups)
    for name, score in table.items():
        least, most = _RANGES.get(name, (0.0, 1.0))
        plain = intervals.bootstrap_estimates(
            score(None), draws[name], n=len(tested.groups), k=k, groups=groups, least=least, most=most
        )
        found[name] = [
            one if one.undefined else replace(one, **null.get(name, {}))  # type: ignore[arg-type]
            for one, null in zip(plain, nulls, strict=True)
        ]
    return found, next(iter(draws.values()))


def note_unconverged(row: LayerEstimates, share_L: Tensor) -> LayerEstimates:
    """The estimates with a note where some of their probes have not converged.

    Args:
        row: One Estimate per layer.
        share_L: Share of the probes that have not converged.
    """
    return [
        one.noted(f"{share:.0%} of the probes have not converged" if share > 0 else "")
        for one, share in zip(row, share_L.tolist(), strict=True)
    ]


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Scores of a linear probe in each layer.

    Args:
        scores: One Estimate per layer, by name (module docstring). The first is the main one: accuracy or auroc.
        draws: (L, B) bootstrap draws of the main score, the same groups in all layers; NaN where undefined.
        p_values: Per layer, probability of a main score as high under the null; NaN where undefined.
        c: (L, F) the selected C; NaN where undefined.
        control: Main score of the control task; None if it was not requested.
        selectivity: Main score minus control; None if it was not requested.
        compression: Compression of the labels by an online code; None if it was not requested.
    """

    scores: Mapping[str, LayerEstimates]
    draws: Tensor
    p_values: list[float]
    c: Tensor
    control: LayerEstimates | None = None
    selectivity: LayerEstimates | None = None
    compression: LayerEstimates | None = None

    @property
    def estimates(self) -> LayerEstimates:
        """The main score."""
        return next(iter(self.scores.values()))

    @property
    def peak(self) -> tuple[int, int, int] | None:
        """Peak layer of the main score and its interval: see ``intervals.peak``."""
        return intervals.peak(self.estimates, self.draws)

    @property
    def plateau(self) -> tuple[int, int] | None:
        """First and last layer of the plateau of the main score: see ``intervals.plateau``."""
        return intervals.plateau(self.estimates)

    @classmethod
    def undefined(cls, names: Sequence[str], row: LayerEstimates, *, control: bool, compression: bool) -> "ProbeResult":
        """A result whose scores are all undefined.

        Args:
            names: Names of the scores.
            row: Undefined estimates with their reasons, one per layer.
            control: Whether the control task was requested.
            compression: Whether the compression was requested.
        """
        empty, nan, of_control = torch.full((len(row), 1), math.nan), [math.nan] * len(row), row if control else None
        return cls(dict.fromkeys(names, row), empty, nan, empty, of_control, of_control, row if compression else None)

    @classmethod
    def concatenate(cls, blocks: Sequence["ProbeResult"]) -> "ProbeResult":
        """The result of consecutive blocks of layers."""

        def join(rows: list[LayerEstimates | None]) -> LayerEstimates | None:
            return None if None in rows else [one for row in rows if row is not None for one in row]

        first = blocks[0]
        return cls(
            scores={name: [one for block in blocks for one in block.scores[name]] for name in first.scores},
            draws=torch.cat([block.draws for block in blocks]),
            p_values=[p for block in blocks for p in block.p_values],
            c=torch.cat([block.c for block in blocks]),
            control=join([block.control for block in blocks]),
            selectivity=join([block.selectivity for block in blocks]),
            compression=join([block.compression for block in blocks]),
        )

    def map(self, change: Callable[[LayerEstimates], LayerEstimates]) -> "ProbeResult":
        """A copy with a function applied to every list of estimates."""
        control, selectivity, compression = (
            None if row is None else change(row) for row in (self.control, self.selectivity, self.compression)
        )
        scores = {name: change(row) for name, row in self.scores.items()}
        return replace(self, scores=scores, control=control, selectivity=selectivity, compression=compression)

    def without(self, problems: Sequence[str], n: int) -> "ProbeResult":
        """A copy that is undefined in the layers that have a problem.

        Args:
            problems: Per layer, the reason; empty where there is none.
            n: Number of samples.
        """

        def masked(row: LayerEstimates) -> LayerEstimates:
            pairs = zip(problems, row, strict=True)
            return [Estimate.undefined_because(problem, n) if problem else one for problem, one in pairs]

        undefined_L1 = torch.tensor([bool(problem) for problem in problems], device=self.draws.device)[:, None]
        p_values = [math.nan if problem else p for problem, p in zip(problems, self.p_values, strict=True)]
        draws, c = (torch.where(undefined_L1, math.nan, found) for found in (self.draws, self.c))
        return replace(self.map(masked), draws=draws, c=c, p_values=p_values)
