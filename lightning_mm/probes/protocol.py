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

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.estimate import Estimate, finite, undefined, values
from lightning_mm.geometry.gram import exact_products
from lightning_mm.probes import intervals
from lightning_mm.probes.cross_entropy import real
from lightning_mm.probes.description_length import description_length
from lightning_mm.probes.held_out import PARTS, HeldOut, held_out
from lightning_mm.probes.sampling import Subject, control_labels, dealt, unsound
from lightning_mm.probes.summary import MULTILABEL, MULTINOMIAL, Summary, Tested, of_classes, of_labels

Kind = Literal["multinomial", "multilabel"]

CROSS_FIT = 1000

_C_TIMES_D = (0.1, 1.0, 10.0, 100.0)
"""Logits grow with the number of features of variance 1: the grid of C is this over D."""


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

    scores: Mapping[str, list[Estimate]]
    draws: Tensor
    p_values: list[float]
    c: Tensor
    control: list[Estimate] | None = None
    selectivity: list[Estimate] | None = None
    compression: list[Estimate] | None = None

    @property
    def estimates(self) -> list[Estimate]:
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

    def over(self, change: Callable[[list[Estimate]], list[Estimate]]) -> "ProbeResult":
        """The same with every list of estimates changed."""
        control, selectivity, compression = (
            None if found is None else change(found) for found in (self.control, self.selectivity, self.compression)
        )
        scores = {name: change(found) for name, found in self.scores.items()}
        return replace(self, scores=scores, control=control, selectivity=selectivity, compression=compression)


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
    labels, groups_N, types_N = labels.cpu(), groups_N.cpu(), (groups_N if types_N is None else types_N).cpu()
    subject = Subject.of(labels, groups_N)
    rows_M = subject.rows
    if subject.fault:
        return _nothing([undefined(subject.fault, len(labels))] * len(x_LND), kind, control, compression)
    faults = unsound(x_LND)
    x_LND = real(x_LND)[:, rows_M.to(x_LND.device)]
    x_LND[[layer for layer, fault in enumerate(faults) if fault]] = 0
    targets = [subject.labels, control_labels(subject.labels, types_N[rows_M], seed)][: 1 + control]
    cross_fit = len(rows_M) <= CROSS_FIT if cross_fit is None else cross_fit
    by_labels = targets if cross_fit else targets[:1] * len(targets)
    run = _Run(
        x=x_LND,
        targets=torch.stack([one[None] if one.ndim == 1 else one.T for one in targets]).to(x_LND.device),
        part=torch.stack([dealt(one, groups_N[rows_M], PARTS, seed) for one in by_labels]).to(x_LND.device),
        groups=groups_N[rows_M],
        c_values=c_values or [value / x_LND.shape[2] for value in _C_TIMES_D],
        test_parts=PARTS if cross_fit else 1,
        seed=seed,
    )
    return _without(run.result(kind, compression), faults, len(labels)).over(
        lambda found: [one.noted(subject.note) for one in found]
    )


@dataclass(frozen=True, eq=False)
class _Run:
    """A probe of labels that allow one.

    Args:
        x: (L, M, D).
        targets: (T, A, M) class ids, true ones and perhaps control.
        part: (T, M).
        groups: (M,).
        c_values: Grid of C.
        test_parts: F.
        seed: Of bootstrap and code.
    """

    x: Tensor
    targets: Tensor
    part: Tensor
    groups: Tensor
    c_values: Sequence[float]
    test_parts: int
    seed: int

    def result(self, kind: Kind, compression: bool) -> ProbeResult:
        """Of all layers."""
        num_classes = int(self.targets[0].max()) + 1
        found = held_out(self.x, self.targets, num_classes, self.part, self.test_parts, self.c_values)
        true, *control = (self._summary(found, kind, target) for target in range(len(self.targets)))
        how = f"{PARTS}-fold cross-fitted" if self.test_parts > 1 else f"tested on one part in {PARTS}"
        note = f"{how}, groups kept together"
        scores = {name: [one.noted(note) for one in row] for name, row in true.scores.items()}
        result = ProbeResult(scores, true.draws, true.p_values, found.c[:, 0])
        if control:
            against, selectivity = self._against(true, control[0])
            result = replace(result, control=against, selectivity=selectivity)
        if not compression:
            return result
        code = description_length(self.x, self.targets[0], num_classes, self.groups, self.c_values, seed=self.seed)
        return replace(result, compression=code)

    def _summary(self, found: HeldOut, kind: Kind, target: int) -> Summary:
        tested = Tested(
            log_p=found.log_p[:, target],
            frequency=found.frequency[target],
            truth=self.targets[target][:, found.rows],
            part=found.part[target],
            groups=self.groups[found.rows.cpu()],
        )
        return of_classes(tested, self.seed) if kind == "multinomial" else of_labels(tested, self.seed)

    def _against(self, true: Summary, control: Summary) -> tuple[list[Estimate], list[Estimate]]:
        """Control, and selectivity: main score minus control."""
        main = next(iter(control.scores.values()))
        if (self.targets[1] == self.targets[1][:, :1]).all():
            alike = [undefined("one class: all types have drawn the same control label", one.n) for one in main]
            return alike, alike
        levels = values(next(iter(true.scores.values())))
        rows = zip(main, levels, values(main), intervals.bounds(true.draws - control.draws).tolist(), strict=True)
        differences = [
            finite(level - other, one.n, k=one.k, low=low, high=high, null=0.0)
            for one, level, other, (low, high) in rows
        ]
        return main, differences


def _nothing(found: list[Estimate], kind: Kind, control: bool, compression: bool) -> ProbeResult:
    names = MULTINOMIAL if kind == "multinomial" else MULTILABEL
    empty, nan = torch.full((len(found), 1), math.nan), [math.nan] * len(found)
    asked = found if control else None
    return ProbeResult(dict.fromkeys(names, found), empty, nan, empty, asked, asked, found if compression else None)


def _without(result: ProbeResult, faults: Sequence[str], n: int) -> ProbeResult:
    """The same with nothing said of faulty layers."""
    bad = torch.tensor([bool(fault) for fault in faults], device=result.draws.device)[:, None]
    kept = result.over(lambda found: [undefined(f, n) if f else one for f, one in zip(faults, found, strict=True)])
    p_values = [math.nan if fault else p for fault, p in zip(faults, result.p_values, strict=True)]
    draws, c = (torch.where(bad, math.nan, found) for found in (result.draws, result.c))
    return replace(kept, draws=draws, c=c, p_values=p_values)
