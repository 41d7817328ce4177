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

from lightning_mm.core.estimate import Estimate
from lightning_mm.probes import intervals, scores
from lightning_mm.probes.cross_validation import bootstrap_weights, num_groups
from lightning_mm.probes.exchange import exchanged_rows, label_ids
from lightning_mm.probes.refits import CrossFit

MULTINOMIAL_SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "nll", "information", "calibration_error")
MULTILABEL_SCORES = ("auroc", "balanced_accuracy", "average_precision")
"""Names of the scores; the first is the main one."""

_DRAWS = 1000
"""Bootstrap draws of the intervals."""

_TRAINING_DRAWS = 50
"""Draws of the training samples, and as many opposite ones, for the variance by what the probes are trained on."""

_TRAINING_STEP = 0.8336
"""Share of a draw's change of the training weights that is applied, t with arctan(t) = t^2.

A score that is linear in the predictions has the same variance per step for any. Right answers turn at once: for logits
that are normal about zero the variance over the draws is arctan(t) / (2 pi), that of first order t^2 / (2 pi).
"""

_NULL_DRAWS = 200
"""Exchanges of the labels for the null."""

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
        refits: The cross-fitted probes; None where a single part is tested.
    """

    log_p: Tensor
    frequency: Tensor
    truth: Tensor
    fold: Tensor
    groups: Tensor
    refits: CrossFit | None


@dataclass(frozen=True, eq=False)
class ScoreSummary:
    """Scores of all layers.

    Args:
        scores: One Estimate per layer, by name.
        draws: (L, B) bootstrap draws of the main score.
        null_draws: (L, B) draws of the main score under the null.
    """

    scores: dict[str, LayerEstimates]
    draws: Tensor
    null_draws: Tensor


Table = Callable[[Tensor, Tensor], Mapping[str, Score]]
"""(L, A, M, K) log-probabilities and (A, M) class ids -> scores by name."""


def multiclass_scores(tested: HeldOutPredictions, seed: int) -> ScoreSummary:
    """Scores of one task with K classes; ``seed`` is that of all draws."""
    n, k = tested.log_p.shape[2:]
    share_K = torch.bincount(tested.truth[0], minlength=k).double() / n
    levels = {
        "accuracy": float(share_K.max()),
        "balanced_accuracy": 1 / k,
        "nll": float(torch.special.entr(share_K).sum()),
        "information": 0.0,
    }
    return _summary(_class_scores, tested, levels, k, seed)


def multilabel_scores(tested: HeldOutPredictions, seed: int) -> ScoreSummary:
    """Means over A labels of the scores of each; ``seed`` is that of all draws."""
    frequent = float(tested.truth.double().mean())
    levels = {"auroc": 0.5, "balanced_accuracy": 0.5, "average_precision": frequent}
    return _summary(partial(_label_scores, tested), tested, levels, len(tested.truth), seed)


def _class_scores(log_p_LAMK: Tensor, truth_AM: Tensor) -> Mapping[str, Score]:
    log_p_LMK, labels_M = log_p_LAMK[:, 0], truth_AM[0]
    predicted_LM, k = log_p_LMK.argmax(2), log_p_LMK.shape[2]
    return {
        "accuracy": partial(scores.accuracy, predicted_LM, labels_M),
        "balanced_accuracy": partial(scores.balanced_accuracy, predicted_LM, labels_M, k),
        "macro_f1": partial(scores.macro_f1, predicted_LM, labels_M, k),
        "nll": partial(scores.nll, log_p_LMK, labels_M),
        "information": partial(scores.v_information, log_p_LMK, labels_M),
        "calibration_error": partial(scores.calibration_error, log_p_LMK, labels_M),
    }


def _label_scores(tested: HeldOutPredictions, log_p_LAMK: Tensor, truth_AM: Tensor) -> Mapping[str, Score]:
    score_LAM = log_p_LAMK[..., 1] - log_p_LAMK[..., 0]
    called_LAM = (log_p_LAMK[..., 1] > tested.frequency[..., 1].log()).long()
    by_fold = {"strata_N": tested.fold}
    return {
        "auroc": _label_mean(partial(scores.auroc, **by_fold), score_LAM, truth_AM),
        "balanced_accuracy": _label_mean(partial(scores.balanced_accuracy, num_classes=2), called_LAM, truth_AM),
        "average_precision": _label_mean(partial(scores.average_precision, **by_fold), score_LAM, truth_AM),
    }


def _label_mean(score: Callable[..., Tensor], values_LAM: Tensor, truth_AM: Tensor) -> Score:
    """The mean of a score over the labels, as a function of the sample weights."""

    def mean(weights: Tensor | None) -> Tensor:
        pairs = zip(values_LAM.unbind(1), truth_AM, strict=True)
        return torch.stack([score(values_LM, truth_M, weights=weights) for values_LM, truth_M in pairs]).nanmean(0)

    return mean


def _summary(table: Table, tested: HeldOutPredictions, levels: Mapping[str, float], k: int, seed: int) -> ScoreSummary:
    """Every score with its interval, chance level and, where it is drawn, chance band.

    Args:
        table: The scores.
        tested: Predictions.
        levels: Chance level by name.
        k: Number of classes or labels.
        seed: Seed of all draws.
    """
    found, groups, spreads = table(tested.log_p, tested.truth), num_groups(tested.groups), _spreads(table, tested, seed)
    weights_BM = bootstrap_weights(tested.groups, _DRAWS, seed).to(tested.fold.device)
    null_draws = {name: torch.stack([each.null[name] for each in spreads]) for name in spreads[0].null}
    rows, draws = {}, {}
    for name, score in found.items():
        value_L, (least, most) = score(None), _RANGES.get(name, (0.0, 1.0))
        training_L = torch.stack([each.training.get(name, torch.zeros(())) for each in spreads]).to(value_L)
        draws[name] = intervals.widened(value_L, score(weights_BM), training_L, groups)
        plain = intervals.bootstrap_estimates(
            value_L, draws[name], n=len(tested.groups), k=k, groups=groups, least=least, most=most
        )
        width_L = null_draws[name].std(1).tolist() if name in null_draws else [None] * len(plain)
        rows[name] = [
            one if one.undefined or name not in levels else intervals.with_null(one, levels[name], width)
            for one, width in zip(plain, width_L, strict=True)
        ]
    main = next(iter(found))
    centered_LB = null_draws[main] - null_draws[main].mean(1, keepdim=True)
    return ScoreSummary(rows, draws[main], centered_LB + levels[main])


@dataclass(frozen=True)
class _Spread:
    """What one layer's scores spread by, beside the draw of the tested samples.

    Args:
        training: () variance of each score over draws of the training samples, tested on the same; empty for one part.
        null: (B,) draws with exchanged labels of the main score and the balanced accuracy.
    """

    training: dict[str, Tensor]
    null: dict[str, Tensor]


def _spreads(table: Table, tested: HeldOutPredictions, seed: int) -> list[_Spread]:
    """Of each layer, by the same draws in all.

    Every sample of a cross-fitted probe is tested once and trains the other probes. The bootstrap with the probes held
    fixed has the variance by the first, which adds to that by the second. A single test part is independent of what its
    probes were trained on: they stay as they are, and the first is all of the variance but that of how good a probe the
    training samples make. That is small: near its optimum a probe is hardly better or worse for a small change.
    """
    rows_BM = exchanged_rows(label_ids(tested.truth), tested.groups, tested.fold, _NULL_DRAWS, seed)
    rows_BM = rows_BM.to(tested.fold.device)
    change_BM = _TRAINING_STEP * (bootstrap_weights(tested.groups, _TRAINING_DRAWS, seed + 1) - 1)
    change_BM = change_BM.to(tested.fold.device)
    both_BM = torch.cat([change_BM, -change_BM])
    found = []
    for layer, log_p_AMK in enumerate(tested.log_p):
        training, null_BAMK = {}, log_p_AMK.expand(len(rows_BM), *log_p_AMK.shape)
        if tested.refits is not None:
            probes = tested.refits.layer(layer)
            retrained = table(probes.reweighted(both_BM), tested.truth)
            training = {name: _odd_variance(score(None)) for name, score in retrained.items()}
            null_BAMK = probes.relabeled(rows_BM)
        exchanged = table(null_BAMK, tested.truth[:, rows_BM])
        names = (next(iter(exchanged)), "balanced_accuracy")
        found.append(_Spread(training, {name: exchanged[name](None) for name in names}))
    return found


def _odd_variance(score_B: Tensor) -> Tensor:
    """() variance of the part that changes its sign with the changes of the weights: draws, then their opposites.

    What does not is no effect of single samples but of the draws' own size: predictions near the boundary turn.
    """
    drawn_B, opposite_B = score_B.chunk(2)
    return ((drawn_B - opposite_B) / (2 * _TRAINING_STEP)).var()


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
        null_draws: (L, B) draws of the main score under the null, the same exchanges of labels in all layers; NaN where
            undefined.
        c: (L, F) the selected C; NaN where undefined.
        control: Main score of the control task; None if it was not requested.
        selectivity: Main score minus control; None if it was not requested.
        compression: Compression of the labels by an online code; None if it was not requested.
    """

    scores: Mapping[str, LayerEstimates]
    draws: Tensor
    null_draws: Tensor
    c: Tensor
    control: LayerEstimates | None = None
    selectivity: LayerEstimates | None = None
    compression: LayerEstimates | None = None

    @property
    def estimates(self) -> LayerEstimates:
        """The main score."""
        return next(iter(self.scores.values()))

    @property
    def p_values(self) -> list[float]:
        """Per layer, probability under the null of a main score this high in any layer; NaN if undefined."""
        return [math.nan if one.p_adjusted is None else one.p_adjusted for one in self.estimates]

    def judged(self) -> "ProbeResult":
        """A copy whose main score has its p-value, adjusted for all layers: see ``intervals.max_t_p_values``."""
        main, adjusted = next(iter(self.scores)), intervals.max_t_p_values(self.estimates, self.null_draws)
        return replace(self, scores={**self.scores, main: adjusted})

    @property
    def peak(self) -> tuple[int, int, int] | None:
        """Peak layer of the main score and its interval: see ``intervals.peak``."""
        return intervals.peak(self.estimates, self.draws)

    @property
    def plateau(self) -> tuple[int, int] | None:
        """First and last layer of the plateau of the main score: see ``intervals.plateau``.

        None where no layer is clear of chance: a maximum that chance gives has no plateau.
        """
        return intervals.plateau(self.estimates) if any(one.is_clear for one in self.estimates) else None

    @classmethod
    def undefined(cls, names: Sequence[str], row: LayerEstimates, *, control: bool, compression: bool) -> "ProbeResult":
        """A result whose scores are all undefined.

        Args:
            names: Names of the scores.
            row: Undefined estimates with their reasons, one per layer.
            control: Whether the control task was requested.
            compression: Whether the compression was requested.
        """
        empty, of_control = torch.full((len(row), 1), math.nan), row if control else None
        return cls(dict.fromkeys(names, row), empty, empty, empty, of_control, of_control, row if compression else None)

    @classmethod
    def concatenate(cls, blocks: Sequence["ProbeResult"]) -> "ProbeResult":
        """The result of consecutive blocks of layers."""

        def join(rows: list[LayerEstimates | None]) -> LayerEstimates | None:
            return None if None in rows else [one for row in rows if row is not None for one in row]

        first = blocks[0]
        return cls(
            scores={name: [one for block in blocks for one in block.scores[name]] for name in first.scores},
            draws=torch.cat([block.draws for block in blocks]),
            null_draws=torch.cat([block.null_draws for block in blocks]),
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
        draws, null_draws, c = (
            torch.where(undefined_L1, math.nan, found) for found in (self.draws, self.null_draws, self.c)
        )
        return replace(self.map(masked), draws=draws, null_draws=null_draws, c=c)
