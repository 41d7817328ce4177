"""The linear probe that can be trusted: held-out groups, train-only standardisation, baselines, controls, intervals.

Data flow: features (L, N, D) of all layers, labels and group ids -> ``probe`` -> ``ProbeResult``: one Estimate per
layer and score. ``analysis`` makes tables of them; the same labels on other features (text only) are a second call.

Whole groups are dealt into five parts (``sampling.dealt``). For a test part, C is chosen in each layer by the
likelihood of the part that follows it, learning from the other three; then the probe is refitted to these four
(``held_out``). Up to ``CROSS_FIT`` samples every part is the test part once and predictions are pooled; beyond, the
first part is.

Shapes: L layers, N samples, D features, K classes or labels, T targets (true, control), A tasks (K labels, or one of K
classes), F test parts, M kept samples, B draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate, values
from lightning_mm.geometry.representations import exact_products
from lightning_mm.probes import intervals
from lightning_mm.probes.cross_entropy import real
from lightning_mm.probes.cross_validation import PARTS, HeldOut, Subject, control_labels, dealt, held_out, unsound
from lightning_mm.probes.description_length import description_length
from lightning_mm.probes.logistic import by_layers
from lightning_mm.probes.result import (
    MULTILABEL,
    MULTINOMIAL,
    ProbeResult,
    Row,
    Summary,
    Tested,
    of_classes,
    of_labels,
    unfinished,
)

Kind = Literal["multinomial", "multilabel"]

CROSS_FIT = 1000

_C_TIMES_D = (0.1, 1.0, 10.0, 100.0)
"""Logits grow with the number of features of variance 1: the grid of C is this over D."""


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
        groups_N: Ids of what must not be both learned from and tested on: the picture of each sample.
        kind: Which kind of labels.
        c_values: Grid of C (scikit-learn's); 0.1 to 100 over D if not given.
        seed: Of parts, control labels and bootstrap.
        cross_fit: Whether every part is tested on; if not given, up to ``CROSS_FIT`` samples.
        control: Also learn random labels, one for each type (Hewitt and Liang 2019).
        types_N: What has one control label: a word, a caption. Groups if not given; what is learned of one group then
            says nothing of another, and the control is chance.
        compression: Also measure the description length.

    Returns:
        Undefined estimates, with the reason, where a layer or the labels allow no probe.
    """
    assert x_LND.shape[1] == len(labels) == len(groups_N), "features, labels and groups are of the same samples"
    assert labels.ndim == (1 if kind == "multinomial" else 2), "class ids are (N,), labels (N, K)"
    x_LND, labels, groups_N = x_LND.detach(), labels.cpu(), groups_N.cpu()
    types_N = groups_N if types_N is None else types_N.cpu()
    n, subject = len(labels), Subject.of(labels, groups_N)
    if subject.fault:
        names = MULTINOMIAL if kind == "multinomial" else MULTILABEL
        reasons = [Estimate.undefined_because(subject.fault, n)] * len(x_LND)
        return ProbeResult.undefined(names, reasons, control=control, compression=compression)
    rows_M, cross_fit = subject.rows.to(x_LND.device), n <= CROSS_FIT if cross_fit is None else cross_fit
    c_values = c_values or [value / x_LND.shape[2] for value in _C_TIMES_D]
    task = _Task.of(subject, groups_N, types_N if control else None, x_LND.device, c_values, cross_fit, seed)

    def block(layers: slice) -> ProbeResult:
        x_LMD, faults = real(x_LND[layers])[:, rows_M], unsound(x_LND[layers])
        x_LMD[[layer for layer, fault in enumerate(faults) if fault]] = 0
        return task.result(x_LMD, compression).without(faults, n)

    result = ProbeResult.joined(by_layers(block, len(x_LND), x_LND.device))
    return result.each(lambda row: [one.noted(subject.note) for one in row])


@dataclass(frozen=True, eq=False)
class _Task:
    """Labels that allow a probe, and how they are probed.

    Args:
        of_classes: Whether the one task has classes; else the tasks are labels.
        targets: (T, A, M) class ids, true ones and perhaps control.
        part: (T, M).
        groups: (M,).
        c_values: Grid of C.
        test_parts: F.
        seed: Of bootstrap and code.
    """

    of_classes: bool
    targets: Tensor
    part: Tensor
    groups: Tensor
    c_values: Sequence[float]
    test_parts: int
    seed: int

    @classmethod
    def of(
        cls,
        subject: Subject,
        groups_N: Tensor,
        types_N: Tensor | None,
        device: torch.device,
        c_values: Sequence[float],
        cross_fit: bool,
        seed: int,
    ) -> "_Task":
        """Deal out parts, and control labels by type if there are types."""
        groups_M, targets = groups_N[subject.rows], [subject.labels]
        if types_N is not None:
            targets.append(control_labels(subject.labels, types_N[subject.rows], seed))
        # A single tested part must be the same for all targets; otherwise each target's labels are spread evenly.
        dealt_by = targets if cross_fit else targets[:1] * len(targets)
        classes = subject.labels.ndim == 1
        return cls(
            of_classes=classes,
            targets=torch.stack([one[None] if classes else one.T for one in targets]).to(device),
            part=torch.stack([dealt(one, groups_M, PARTS, seed) for one in dealt_by]).to(device),
            groups=groups_M,
            c_values=c_values,
            test_parts=PARTS if cross_fit else 1,
            seed=seed,
        )

    def result(self, x_LMD: Tensor, compression: bool) -> ProbeResult:
        """Of layers without faults, or zero."""
        num_classes = int(self.targets[0].max()) + 1
        found = held_out(x_LMD, self.targets, num_classes, self.part, self.test_parts, self.c_values)
        true, *control = (self._summary(found, target) for target in range(len(self.targets)))
        how = f"{PARTS}-fold cross-fitted" if self.test_parts > 1 else f"tested on one part in {PARTS}"
        note = f"{how}, groups kept together"
        notes = partial(unfinished, share_L=found.unfinished[:, 0])
        scores = {name: notes([one.noted(note) for one in row]) for name, row in true.scores.items()}
        result = ProbeResult(scores, true.draws, true.p_values, found.c[:, 0])
        if control:
            against, selectivity = (
                unfinished(row, found.unfinished.amax(1)) for row in self._against(true, control[0])
            )
            result = replace(result, control=against, selectivity=selectivity)
        if not compression:
            return result
        code = description_length(x_LMD, self.targets[0], num_classes, self.groups, self.c_values, seed=self.seed)
        return replace(result, compression=code)

    def _summary(self, found: HeldOut, target: int) -> Summary:
        tested = Tested(
            log_p=found.log_p[:, target],
            frequency=found.frequency[target],
            truth=self.targets[target][:, found.rows],
            part=found.part[target],
            groups=self.groups[found.rows.cpu()],
        )
        return of_classes(tested, self.seed) if self.of_classes else of_labels(tested, self.seed)

    def _against(self, true: Summary, control: Summary) -> tuple[Row, Row]:
        """Control, and selectivity: main score minus control."""
        main = next(iter(control.scores.values()))
        if (self.targets[1] == self.targets[1][:, :1]).all():
            alike = [
                Estimate.undefined_because("one class: all types have drawn the same control label", one.n)
                for one in main
            ]
            return alike, alike
        levels = values(next(iter(true.scores.values())))
        rows = zip(main, levels, values(main), intervals.bounds(true.draws - control.draws).tolist(), strict=True)
        differences = [
            Estimate.of(level - other, one.n, k=one.k, low=low, high=high, null=0.0)
            for one, level, other, (low, high) in rows
        ]
        return main, differences
