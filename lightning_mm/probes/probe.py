"""Linear probes of all layers: group cross-validation, train-only standardization, baselines, control tasks, intervals.

Whole groups are assigned to five folds (``cross_validation.stratified_group_folds``). For each test fold, C is selected
per layer by the likelihood of the next fold, after training on the other three; then the probe is refitted on these
four. Up to ``CROSS_FIT`` samples every fold is tested once and the predictions are pooled; with more, only the first.

Data flow: features (L, N, D) of all layers, labels and group ids -> ``probe`` -> ``ProbeResult``: one Estimate per
layer and score -> ``analysis.probing``. A text-only baseline is a second call with the same labels on other features.

Shapes: L layers, N samples, D features, K classes or labels, T targets (true, control), A tasks (K labels, or one of K
classes), F test folds, M kept samples, B bootstrap draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate, values
from lightning_mm.geometry.representations import exact_products
from lightning_mm.probes import intervals
from lightning_mm.probes.cross_entropy import as_float
from lightning_mm.probes.cross_validation import (
    NUM_FOLDS,
    CrossValPredictions,
    LearnableLabels,
    control_labels,
    cross_val_predict,
    layer_problems,
    stratified_group_folds,
)
from lightning_mm.probes.description_length import description_length
from lightning_mm.probes.logistic import map_layer_blocks
from lightning_mm.probes.result import (
    MULTILABEL_SCORES,
    MULTINOMIAL_SCORES,
    HeldOutPredictions,
    LayerEstimates,
    ProbeResult,
    ScoreSummary,
    multiclass_scores,
    multilabel_scores,
    note_unconverged,
)

Kind = Literal["multinomial", "multilabel"]

CROSS_FIT = 1000
"""Up to this many samples every fold is a test fold once."""

_C_TIMES_D = (0.1, 1.0, 10.0, 100.0)
"""The grid of C is this over D, as logits grow with the number of features of variance 1."""


@exact_products()
def probe(
    x_LND: Tensor,
    labels: Tensor,
    groups_N: Tensor,
    *,
    kind: Kind,
    c_values: Sequence[float] | None = None,
    seed: int = 0,
    cross_fit: bool | None = None,
    control: bool = False,
    types_N: Tensor | None = None,
    compression: bool = False,
) -> ProbeResult:
    """Train and test a linear probe in every layer.

    Args:
        x_LND: Features of any floating type.
        labels: (N,) class ids (multinomial) or (N, K) {0, 1} (multilabel).
        groups_N: Ids of what must not be split between training and test: the picture of each sample.
        kind: Kind of the labels.
        c_values: Grid of scikit-learn's C; None: 0.1 to 100 over D.
        seed: Seed of folds, control labels and bootstrap.
        cross_fit: Whether every fold is tested; None: up to ``CROSS_FIT`` samples.
        control: Also probe random labels, one for each type (Hewitt and Liang 2019).
        types_N: Ids of what has one control label: a word, a caption. None: the groups; the control labels of a test
            group then cannot be learned from others, and the control score is chance.
        compression: Also measure the description length (Voita and Titov 2020).

    Returns:
        Undefined estimates, with the reason, where a layer or the labels allow no probe.
    """
    assert x_LND.shape[1] == len(labels) == len(groups_N), "features, labels and groups are of the same samples"
    assert labels.ndim == (1 if kind == "multinomial" else 2), "class ids are (N,), labels (N, K)"
    x_LND, labels, groups_N = x_LND.detach(), labels.cpu(), groups_N.cpu()
    types_N = groups_N if types_N is None else types_N.cpu()
    n, learnable = len(labels), LearnableLabels.of(labels, groups_N)
    if learnable.problem:
        names = MULTINOMIAL_SCORES if kind == "multinomial" else MULTILABEL_SCORES
        reasons = [Estimate.undefined_because(learnable.problem, n)] * len(x_LND)
        return ProbeResult.undefined(names, reasons, control=control, compression=compression)
    rows_M, cross_fit = learnable.rows.to(x_LND.device), n <= CROSS_FIT if cross_fit is None else cross_fit
    c_values = c_values or [value / x_LND.shape[2] for value in _C_TIMES_D]
    task = _ProbeTask.of(learnable, groups_N, types_N if control else None, x_LND.device, c_values, cross_fit, seed)

    def probe_block(layers: slice) -> ProbeResult:
        x_LMD, problems = as_float(x_LND[layers])[:, rows_M], layer_problems(x_LND[layers])
        x_LMD[[layer for layer, problem in enumerate(problems) if problem]] = 0
        return task.result(x_LMD, compression).without(problems, n)

    result = ProbeResult.concatenate(map_layer_blocks(probe_block, len(x_LND), x_LND.device))
    return result.map(lambda row: [one.noted(learnable.note) for one in row]).judged()


@dataclass(frozen=True, eq=False)
class _ProbeTask:
    """Learnable labels, and how they are probed.

    Args:
        is_multiclass: Whether the one task has classes; otherwise the tasks are labels.
        targets: (T, A, M) class ids: the true ones, and those of the control task if there is one.
        fold: (T, M) fold of each sample.
        groups: (M,) group ids.
        c_values: Grid of C.
        num_test_folds: F.
        seed: Seed of bootstrap and description length.
    """

    is_multiclass: bool
    targets: Tensor
    fold: Tensor
    groups: Tensor
    c_values: Sequence[float]
    num_test_folds: int
    seed: int

    @classmethod
    def of(
        cls,
        learnable: LearnableLabels,
        groups_N: Tensor,
        types_N: Tensor | None,
        device: torch.device,
        c_values: Sequence[float],
        cross_fit: bool,
        seed: int,
    ) -> "_ProbeTask":
        """Assign folds, and control labels by type if there are types."""
        groups_M, targets = groups_N[learnable.rows], [learnable.labels]
        if types_N is not None:
            targets.append(control_labels(learnable.labels, types_N[learnable.rows], seed))
        # A single test fold must be the same for all targets; otherwise each target's labels are spread evenly.
        stratify_by = targets if cross_fit else targets[:1] * len(targets)
        is_multiclass = learnable.labels.ndim == 1
        folds = [stratified_group_folds(one, groups_M, NUM_FOLDS, seed) for one in stratify_by]
        return cls(
            is_multiclass=is_multiclass,
            targets=torch.stack([one[None] if is_multiclass else one.T for one in targets]).to(device),
            fold=torch.stack(folds).to(device),
            groups=groups_M,
            c_values=c_values,
            num_test_folds=NUM_FOLDS if cross_fit else 1,
            seed=seed,
        )

    def result(self, x_LMD: Tensor, compression: bool) -> ProbeResult:
        """Result for a block of layers; the features of layers without a probe are zero."""
        num_classes = int(self.targets[0].max()) + 1
        found = cross_val_predict(x_LMD, self.targets, num_classes, self.fold, self.num_test_folds, self.c_values)
        true, *control = (self._scores(found, target) for target in range(len(self.targets)))
        how = f"{NUM_FOLDS}-fold cross-fitted" if self.num_test_folds > 1 else f"tested on one part in {NUM_FOLDS}"
        note = f"{how}, groups kept together"
        scores = {
            name: note_unconverged([one.noted(note) for one in row], found.unconverged[:, 0])
            for name, row in true.scores.items()
        }
        result = ProbeResult(scores, true.draws, true.null_draws, found.c[:, 0])
        if control:
            rows = self._selectivity(true, control[0])
            of_control, selectivity = (note_unconverged(row, found.unconverged.amax(1)) for row in rows)
            result = replace(result, control=of_control, selectivity=selectivity)
        if not compression:
            return result
        code = description_length(x_LMD, self.targets[0], num_classes, self.groups, self.c_values, seed=self.seed)
        return replace(result, compression=code)

    def _scores(self, found: CrossValPredictions, target: int) -> ScoreSummary:
        tested = HeldOutPredictions(
            log_p=found.log_p[:, target],
            frequency=found.frequency[target],
            truth=self.targets[target][:, found.rows],
            fold=found.fold[target],
            groups=self.groups[found.rows.cpu()],
            refits=found.refits[target] if found.refits else None,
        )
        return multiclass_scores(tested, self.seed) if self.is_multiclass else multilabel_scores(tested, self.seed)

    def _selectivity(self, true: ScoreSummary, control: ScoreSummary) -> tuple[LayerEstimates, LayerEstimates]:
        """Main score of the control task, and selectivity: the main score minus it."""
        main = next(iter(control.scores.values()))
        if (self.targets[1] == self.targets[1][:, :1]).all():
            why = "one class: all types have drawn the same control label"
            alike = [Estimate.undefined_because(why, one.n) for one in main]
            return alike, alike
        levels = values(next(iter(true.scores.values())))
        ends = intervals.percentile_interval(true.draws - control.draws).tolist()
        differences = [
            Estimate.of(level - other, one.n, k=one.k, low=low, high=high, null=0.0)
            for one, level, other, (low, high) in zip(main, levels, values(main), ends, strict=True)
        ]
        return main, differences
