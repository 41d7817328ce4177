"""Held-out predictions as scores with intervals, what chance would give, and how likely chance would give as much.

Data flow: predictions of ``HeldOut`` + true labels + groups -> ``Summary``, one Estimate per layer and score.

Scores of classes: accuracy (null: the majority class), balanced_accuracy, macro_f1, nll (nats; null: the entropy of the
classes), information (bits of V-information; null: 0), calibration_error. Of labels, as means over them: auroc,
balanced_accuracy (a label is called where it is likelier than in training), average_precision (null: how frequent
labels are).

Shapes: L layers, M tested samples, A labels, K classes, B draws.

What a probe found in every layer.

Data flow: ``protocol`` makes one of a block of layers at a time and joins them; ``analysis`` reads its estimates.

Shapes: L layers, F test parts, B draws.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate, values
from lightning_mm.probes import intervals, scores
from lightning_mm.probes.cross_validation import group_draws, num_groups

MULTINOMIAL = ("accuracy", "balanced_accuracy", "macro_f1", "nll", "information", "calibration_error")
MULTILABEL = ("auroc", "balanced_accuracy", "average_precision")
"""The first is the main one."""

_DRAWS = 1000
_CHANCE_DRAWS = 200

_RANGES = {"nll": (0.0, math.inf), "information": (-math.inf, math.inf)}
"""Of scores that are not shares."""

Score = Callable[[Tensor | None], Tensor]
"""(B, M) weights -> (L, B), or none -> (L,)."""


@dataclass(frozen=True, eq=False)
class Tested:
    """Predictions of one target for M samples.

    Args:
        log_p: (L, A, M, K) log-probabilities; A is 1 for classes, K is 2 for labels.
        frequency: (A, M, K) of the classes in training.
        truth: (A, M) class ids.
        part: (M,) what one set of probes has predicted.
        groups: (M,).
    """

    log_p: Tensor
    frequency: Tensor
    truth: Tensor
    part: Tensor
    groups: Tensor

    @property
    def overlap(self) -> float:
        """How much wider cross-fitted scores scatter by chance than those of one test part.

        Under chance a linear probe is right of one sample as far as others of its label are like it. Cross-fitted, each
        pair of samples says so twice, once each way: twice the variance.
        """
        return 1.0 if len(torch.unique(self.part)) == 1 else math.sqrt(2)


@dataclass(frozen=True, eq=False)
class Summary:
    """Scores of all layers.

    Args:
        scores: By name, one Estimate per layer.
        draws: (L, B) of the main score.
        p_values: Per layer, of a main score this high by chance.
    """

    scores: dict[str, list[Estimate]]
    draws: Tensor
    p_values: list[float]


def of_classes(tested: Tested, seed: int) -> Summary:
    """Scores of one task with K classes."""
    log_p_LMK, labels_M = tested.log_p[:, 0], tested.truth[0]
    predicted_LM, (n, k) = log_p_LMK.argmax(2), log_p_LMK.shape[1:]
    share_K = torch.bincount(labels_M, minlength=k).double() / n
    majority, entropy = float(share_K.max()), float(torch.special.entr(share_K).sum())
    # Samples of a group with the same label are read alike, right or wrong: they are one trial.
    trials = torch.unique(torch.stack([tested.groups.to(labels_M.device), labels_M]), dim=1).shape[1]
    spread = tested.overlap * math.sqrt(majority * (1 - majority) / trials)
    table = {
        "accuracy": partial(scores.accuracy, predicted_LM, labels_M),
        "balanced_accuracy": partial(scores.balanced_accuracy, predicted_LM, labels_M, k),
        "macro_f1": partial(scores.macro_f1, predicted_LM, labels_M, k),
        "nll": partial(scores.nll, log_p_LMK, labels_M),
        "information": partial(scores.information, log_p_LMK, labels_M),
        "calibration_error": partial(scores.calibration_error, log_p_LMK, labels_M),
    }
    nulls = {
        "accuracy": intervals.band(majority, spread),
        "balanced_accuracy": {"null": 1 / k},
        "nll": {"null": entropy},
        "information": {"null": 0.0},
    }
    found, draws_LB = _estimates(table, [nulls] * len(log_p_LMK), tested, k, seed)
    return Summary(found, draws_LB, [intervals.p_value(v, majority, spread) for v in values(found["accuracy"])])


def of_labels(tested: Tested, seed: int) -> Summary:
    """Means over A labels of the scores of each."""
    score_LAM = tested.log_p[..., 1] - tested.log_p[..., 0]
    called_LAM = (tested.log_p[..., 1] > tested.frequency[..., 1].log()).long()
    by_part = {"strata_N": tested.part}
    table = {
        "auroc": _over_labels(partial(scores.auroc, **by_part), score_LAM, tested.truth),
        "balanced_accuracy": _over_labels(partial(scores.balanced_accuracy, num_classes=2), called_LAM, tested.truth),
        "average_precision": _over_labels(partial(scores.average_precision, **by_part), score_LAM, tested.truth),
    }
    chance = partial(intervals.chance_auroc, truth_AN=tested.truth, strata_N=tested.part, groups_N=tested.groups)
    ranked_L, called_L = (
        (chance(found.float(), draws=_CHANCE_DRAWS, seed=seed).std(1) * tested.overlap).tolist()
        for found in (score_LAM, called_LAM)
    )
    frequent = {"null": float(tested.truth.double().mean())}
    nulls = [
        {
            "auroc": intervals.band(0.5, ranked),
            "balanced_accuracy": intervals.band(0.5, called),
            "average_precision": frequent,
        }
        for ranked, called in zip(ranked_L, called_L, strict=True)
    ]
    found, draws_LB = _estimates(table, nulls, tested, len(tested.truth), seed)
    pairs = zip(values(found["auroc"]), ranked_L, strict=True)
    return Summary(found, draws_LB, [intervals.p_value(value, 0.5, spread) for value, spread in pairs])


def _over_labels(score: Callable[..., Tensor], values_LAM: Tensor, truth_AM: Tensor) -> Score:
    def mean(weights: Tensor | None) -> Tensor:
        pairs = zip(values_LAM.unbind(1), truth_AM, strict=True)
        return torch.stack([score(values_LM, truth_M, weights=weights) for values_LM, truth_M in pairs]).nanmean(0)

    return mean


def _estimates(
    table: Mapping[str, Score], nulls: Sequence[Mapping[str, dict[str, float]]], tested: Tested, k: int, seed: int
) -> tuple[dict[str, list[Estimate]], Tensor]:
    """Every score with its interval and each layer's nulls, and the draws of the first."""
    weights_BM = group_draws(tested.groups, _DRAWS, seed).to(tested.part.device)
    draws = {name: score(weights_BM) for name, score in table.items()}
    found, groups = {}, num_groups(tested.groups)
    for name, score in table.items():
        least, most = _RANGES.get(name, (0.0, 1.0))
        plain = intervals.estimates(
            score(None), draws[name], n=len(tested.groups), k=k, groups=groups, least=least, most=most
        )
        pairs = zip(plain, nulls, strict=True)
        found[name] = [one if one.undefined else _with_null(one, **null.get(name, {})) for one, null in pairs]
    return found, next(iter(draws.values()))


def _with_null(
    one: Estimate, null: float | None = None, null_low: float | None = None, null_high: float | None = None
) -> Estimate:
    return replace(one, null=null, null_low=null_low, null_high=null_high)


Row = list[Estimate]
"""One Estimate per layer."""


def unfinished(row: Row, share_L: Tensor) -> Row:
    """The same with a note where some share of the probes behind an estimate has not converged."""
    return [
        one.noted(f"{share:.0%} of the probes have not converged" if share > 0 else "")
        for one, share in zip(row, share_L.tolist(), strict=True)
    ]


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a linear probe reads in each layer.

    Args:
        scores: By name, one Estimate per layer; see ``summary``. The first is the main one: accuracy or auroc.
        draws: (L, B) bootstrap draws of the main score, the same groups in all layers; NaN where undefined.
        p_values: Per layer, of a main score this high by chance; NaN where undefined.
        c: (L, F) the chosen C; NaN where undefined.
        control: Main score of the control task, if asked for.
        selectivity: Main score minus control.
        compression: Of the labels by an online code, if asked for.
    """

    scores: Mapping[str, Row]
    draws: Tensor
    p_values: list[float]
    c: Tensor
    control: Row | None = None
    selectivity: Row | None = None
    compression: Row | None = None

    @property
    def estimates(self) -> Row:
        """The main score."""
        return next(iter(self.scores.values()))

    @property
    def peak(self) -> tuple[int, int, int] | None:
        """See ``intervals.peak``."""
        return intervals.peak(self.estimates, self.draws)

    @property
    def plateau(self) -> tuple[int, int] | None:
        """See ``intervals.plateau``."""
        return intervals.plateau(self.estimates)

    @classmethod
    def undefined(cls, names: Sequence[str], row: Row, *, control: bool, compression: bool) -> "ProbeResult":
        """Of scores with such names, nothing but reasons."""
        empty, nan, asked = torch.full((len(row), 1), math.nan), [math.nan] * len(row), row if control else None
        return cls(dict.fromkeys(names, row), empty, nan, empty, asked, asked, row if compression else None)

    @classmethod
    def joined(cls, blocks: Sequence["ProbeResult"]) -> "ProbeResult":
        """Of consecutive blocks of layers."""

        def row(rows: list[Row | None]) -> Row | None:
            return None if None in rows else [one for found in rows if found is not None for one in found]

        first = blocks[0]
        return cls(
            scores={name: [one for block in blocks for one in block.scores[name]] for name in first.scores},
            draws=torch.cat([block.draws for block in blocks]),
            p_values=[p for block in blocks for p in block.p_values],
            c=torch.cat([block.c for block in blocks]),
            control=row([block.control for block in blocks]),
            selectivity=row([block.selectivity for block in blocks]),
            compression=row([block.compression for block in blocks]),
        )

    def each(self, change: Callable[[Row], Row]) -> "ProbeResult":
        """The same with every row of estimates changed."""
        control, selectivity, compression = (
            None if row is None else change(row) for row in (self.control, self.selectivity, self.compression)
        )
        scores = {name: change(row) for name, row in self.scores.items()}
        return replace(self, scores=scores, control=control, selectivity=selectivity, compression=compression)

    def without(self, faults: Sequence[str], n: int) -> "ProbeResult":
        """The same with nothing said of faulty layers, but why; n samples were there."""
        faulty = torch.tensor([bool(fault) for fault in faults], device=self.draws.device)[:, None]
        kept = self.each(
            lambda row: [Estimate.undefined_because(f, n) if f else one for f, one in zip(faults, row, strict=True)]
        )
        p_values = [math.nan if fault else p for fault, p in zip(faults, self.p_values, strict=True)]
        draws, c = (torch.where(faulty, math.nan, found) for found in (self.draws, self.c))
        return replace(kept, draws=draws, c=c, p_values=p_values)
