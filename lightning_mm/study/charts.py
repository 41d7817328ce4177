"""What the charts of a study hold: differences, gains against costs, curves over layers.

Data flow: ``StudyComparison`` and curves -> the plain data of ``report.study_page``.
"""

from collections.abc import Sequence

from lightning_mm.core.layer_table import LayerRow
from lightning_mm.report.figures.intervals import IntervalRow, TradeRow
from lightning_mm.report.study_page import Differences, LayerCurves, Trade
from lightning_mm.study.comparison import StudyComparison, TestComparison
from lightning_mm.study.layer_curves import curve, mean_rows
from lightning_mm.study.layers import DRIFT_OF_WEIGHTS
from lightning_mm.study.results import StudyResults
from lightning_mm.study.settings import START
from lightning_mm.study.statistics import Contrast

_LOOKS = {
    "entailment": "Does the caption fit?",
    "objects": "Which objects are there?",
    "meeting": "Where do picture and caption meet?",
    "gap": "How far apart are they?",
}


def difference_charts(results: StudyResults, found: StudyComparison) -> list[Differences]:
    """Differences with their corrected intervals, by test; losses of text and facts."""
    roles = results.settings.roles
    made = []
    for name, test in found.tests.items():
        rivals = [*test.rivals, *test.against_full]
        by_type = [_row(kind, each) for kind, each in test.by_type.items()]
        made += [
            Differences(f"Against {roles.control}", name, "points", [_row(c.arm, c) for c in test.against_control]),
            Differences(f"{roles.main} against its rivals", name, "points", [_row(c.against, c) for c in rivals]),
            Differences(f"{roles.main} at equal cost", name, "points", [_row(c.against, c) for c in test.equal_cost]),
            Differences(f"{roles.main} against {roles.control}", f"{name}, by type", "points", by_type),
        ]
    text = [_row(each.arm, each, 1.0) for each in found.text_contrasts]
    facts = [_row(each.arm, each) for each in found.facts_contrasts]
    return [
        *made,
        Differences("Text lost", "against before", "nats per token", text),
        Differences("Facts known", "against before", "points", facts),
    ]


def trade_charts(results: StudyResults, found: StudyComparison) -> list[Trade]:
    """What each arm gains over the control against the text that it loses, and against its compute."""
    gain = f"points against {results.settings.roles.control}"
    return [chart for name, test in found.tests.items() for chart in _trades(name, test, found, gain)]


def curves_over_layers(results: StudyResults, found: StudyComparison) -> list[LayerCurves]:
    """What the layers of the main models say, and how far their weights have moved."""
    roles = results.settings.roles
    shown = [arm for arm in (START, roles.main, roles.full, roles.auto) if arm in found.arms]
    made = [
        LayerCurves(title, {arm: rows for arm in shown if (rows := curve(results, arm, found.seeds, look))})
        for look, title in _LOOKS.items()
    ]
    moved = {arm: rows for arm in shown if (rows := _drift(results, arm, found.seeds))}
    return [*made, LayerCurves("How far have the weights moved?", moved)]


def _row(label: str, contrast: Contrast, scale: float = 100.0) -> IntervalRow:
    seeds = tuple(scale * value for value in contrast.by_seed) if len(contrast.by_seed) > 1 else ()
    return IntervalRow(label, *_ends(contrast, scale), seeds)


def _ends(contrast: Contrast, scale: float = 100.0) -> tuple[float, float, float]:
    return scale * contrast.value, scale * contrast.corrected_low, scale * contrast.corrected_high


def _trades(name: str, test: TestComparison, found: StudyComparison, gain: str) -> list[Trade]:
    lost = {each.arm: _ends(each, 1.0) for each in found.text_contrasts}
    flops = {arm: cost["flops"] for arm, cost in found.costs.items() if cost["flops"]}
    most = max(flops.values(), default=1.0)
    by_text = [TradeRow(c.arm, *lost[c.arm], *_ends(c)) for c in test.against_control if c.arm in lost]
    by_cost = [
        TradeRow(c.arm, *(100 * flops[c.arm] / most,) * 3, *_ends(c)) for c in test.against_control if c.arm in flops
    ]
    return [
        Trade("Gain against text lost", name, "nats per token lost", gain, by_text),
        Trade("Gain against compute", name, "% of the most FLOPs", gain, by_cost),
    ]


def _drift(results: StudyResults, arm: str, seeds: Sequence[int]) -> list[LayerRow]:
    return mean_rows([[r for r in results.layers(arm, seed) if r.measure == DRIFT_OF_WEIGHTS] for seed in seeds])
