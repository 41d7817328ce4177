"""What the results of a study come to: levels, differences with corrected intervals, costs, losses.

Each comparison is made on the seeds in which all of its arms are complete; seeds that are left out for that are said.

Data flow: ``StudyResults`` -> ``compare_arms`` -> ``StudyComparison`` -> ``sentences`` and the report.

Shapes: A arms, S seeds, Q questions.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_mm.study.inputs import FACTS
from lightning_mm.study.results import Questions, StudyResults
from lightning_mm.study.settings import START
from lightning_mm.study.statistics import Contrast, Level, contrasts, levels

ALL = "all"


@dataclass(frozen=True)
class TestLevels:
    """How often the questions of one type are answered exactly.

    Args:
        kind: Question type; ``all``.
        num: Number of questions.
        majority: Share of the most frequent answer.
        arms: By arm.
        other: The same with another picture, of the arms, on the questions that were asked so.
        gray: The same with a gray picture.
        choice: Share of right choices, by arm; empty where none was asked.
    """

    kind: str
    num: int
    majority: float
    arms: Mapping[str, Level]
    other: Mapping[str, Level]
    gray: Mapping[str, Level]
    choice: Mapping[str, float]


@dataclass(frozen=True)
class TestComparison:
    """One test.

    Args:
        name: Its name.
        rows: All questions first, then by type.
        against_control: Every arm minus the control.
        rivals: The main arm minus each rival.
        against_full: The main arm minus the one that trains everything; empty without one.
        auto: The chosen layers minus the main arm; empty without such an arm.
        equal_cost: The main arm minus each arm that costs more, at the cost of the main one.
        by_type: The main arm minus the control, by question type, corrected for all types.
        grounding: Own picture minus another one, by arm.
        nats: Every arm minus the control, in nats of a question's right answer: how unlikely it is to the model. It
            tells smaller differences than exact answers do.
    """

    name: str
    rows: list[TestLevels]
    against_control: list[Contrast] = field(default_factory=list)
    rivals: list[Contrast] = field(default_factory=list)
    against_full: list[Contrast] = field(default_factory=list)
    auto: list[Contrast] = field(default_factory=list)
    equal_cost: list[Contrast] = field(default_factory=list)
    by_type: dict[str, Contrast] = field(default_factory=dict)
    grounding: dict[str, Contrast] = field(default_factory=dict)
    nats: list[Contrast] = field(default_factory=list)


@dataclass(frozen=True)
class StudyComparison:
    """A whole study.

    Args:
        arms: Complete in all the seeds that are compared; what they begin from first.
        seeds: Those seeds.
        incomplete: Jobs of the study that are not complete.
        tests: By name.
        text: Nats per token, by arm.
        text_contrasts: Every arm minus what it began from, in nats.
        text_rivals: The main arm minus every other one, in nats.
        facts: Share of facts that are still known, by arm.
        facts_contrasts: Every arm minus what it began from.
        facts_rivals: The main arm minus every other one.
        costs: FLOPs and seconds of a step, weights, layers, by arm.
    """

    arms: list[str]
    seeds: list[int]
    incomplete: list[str]
    tests: dict[str, TestComparison]
    text: dict[str, Level]
    text_contrasts: list[Contrast]
    text_rivals: list[Contrast]
    facts: dict[str, Level]
    facts_contrasts: list[Contrast]
    facts_rivals: list[Contrast]
    costs: dict[str, dict[str, Any]]


def compare_arms(results: StudyResults) -> StudyComparison:
    """All comparisons of a study.

    Args:
        results: Its results; some of it is complete.
    """
    arms, seeds = _complete(results)
    resamples = results.settings.resamples
    tests = {name: _test(results, name, arms, seeds) for name in results.tests if name != FACTS}
    text: dict[str, Level] = {}
    text_contrasts: list[Contrast] = []
    text_rivals: list[Contrast] = []
    if results.settings.text is not None:
        nats = results.texts(arms, seeds)
        passages = torch.arange(nats.shape[2])
        text = dict(zip(arms, levels(nats, passages, resamples), strict=True))
        text_contrasts = _pairs(nats, passages, arms, _from_start(arms), resamples)
        text_rivals = _pairs(nats, passages, arms, _from_main(results, arms), resamples)
    facts: dict[str, Level] = {}
    facts_contrasts: list[Contrast] = []
    facts_rivals: list[Contrast] = []
    if FACTS in results.tests:
        scores = results.scores(FACTS, arms, seeds)
        pictures = results.tests[FACTS].pictures
        facts = dict(zip(arms, levels(scores, pictures, resamples), strict=True))
        facts_contrasts = _pairs(scores, pictures, arms, _from_start(arms), resamples)
        facts_rivals = _pairs(scores, pictures, arms, _from_main(results, arms), resamples)
    missing = [
        f"{arm}, seed {seed}"
        for seed in results.settings.seeds
        for arm in (START, *results.settings.arms)
        if arm not in arms or seed not in seeds
    ]
    costs = {arm: _cost(results, arm, seeds) for arm in arms}
    return StudyComparison(
        arms,
        seeds,
        missing,
        tests,
        text,
        text_contrasts,
        text_rivals,
        facts,
        facts_contrasts,
        facts_rivals,
        costs,
    )


def _complete(results: StudyResults) -> tuple[list[str], list[int]]:
    """Arms and seeds that are compared: all arms of the seeds that have most of them complete."""
    arms = results.arms
    while True:
        if seeds := results.seeds(arms):
            return arms, seeds
        # No seed has all of them: the arm that fewest seeds have is left out.
        fewest = min(reversed(arms), key=lambda arm: len(results.seeds([arm])))
        arms = [arm for arm in arms if arm != fewest]


def _test(results: StudyResults, name: str, arms: Sequence[str], seeds: Sequence[int]) -> TestComparison:
    questions, roles, resamples = results.tests[name], results.settings.roles, results.settings.resamples
    scores = results.scores(name, arms, seeds)
    found = TestComparison(name, _rows(results, name, arms, seeds, scores))
    pictures = questions.pictures
    trained = [arm for arm in arms if arm != START]

    def compared(pairs: Sequence[tuple[str, str]], of: Tensor = scores) -> list[Contrast]:
        return _pairs(of, pictures, arms, [pair for pair in pairs if set(pair) <= set(arms)], resamples)

    found.against_control.extend(compared([(arm, roles.control) for arm in trained if arm != roles.control]))
    if roles.control in arms:
        unlikely = results.scores(name, arms, seeds, column="nats")
        found.nats.extend(compared([(arm, roles.control) for arm in trained if arm != roles.control], unlikely))
    found.rivals.extend(compared([(roles.main, rival) for rival in roles.rivals]))
    found.against_full.extend(compared([(roles.main, roles.full)]))
    found.auto.extend(compared([(roles.auto, roles.main)]))
    dearer = [arm for arm in trained if arm != roles.main and results.result(arm, seeds[0]).get("equal_step")]
    if dearer and roles.main in arms:
        early = results.scores(name, arms, seeds, moment="equal_cost")
        early[arms.index(roles.main)] = scores[arms.index(roles.main)]
        found.equal_cost.extend(compared([(roles.main, arm) for arm in dearer], early))
    if {roles.main, roles.control} <= set(arms):
        found.by_type.update(_by_type(scores, questions, arms, (roles.main, roles.control), resamples))
    found.grounding.update(_grounding(results, name, arms, seeds, scores))
    return found


def _by_type(
    scores: Tensor, questions: Questions, arms: Sequence[str], pair: tuple[str, str], resamples: int
) -> dict[str, Contrast]:
    found = {}
    for kind in questions.kinds:
        own = questions.of_kind(kind)
        (found[kind],) = contrasts(
            scores[:, :, own], questions.pictures[own], arms, [pair], resamples, families=len(questions.kinds)
        )
    return found


def _grounding(
    results: StudyResults, name: str, arms: Sequence[str], seeds: Sequence[int], scores: Tensor
) -> dict[str, Contrast]:
    """Own picture minus another one, of each arm, on the questions that were asked both ways."""
    blind = results.scores(name, arms, seeds, shown="other")
    both = torch.isfinite(blind).all(0).all(0) & torch.isfinite(scores).all(0).all(0)
    if not bool(both.any()):
        return {}
    pictures, found = results.tests[name].pictures[both], {}
    for place, arm in enumerate(arms):
        pair = torch.stack([scores[place][:, both], blind[place][:, both]])
        (found[arm],) = contrasts(
            pair, pictures, ["own", "other"], [("own", "other")], results.settings.resamples, families=len(arms)
        )
    return found


def _rows(
    results: StudyResults, name: str, arms: Sequence[str], seeds: Sequence[int], scores: Tensor
) -> list[TestLevels]:
    questions = results.tests[name]
    blind = {shown: results.scores(name, arms, seeds, shown=shown) for shown in ("other", "gray")}
    choice = results.scores(name, arms, seeds, column="choice")
    found = []
    for kind in (None, *questions.kinds):
        own = questions.of_kind(kind) & torch.isfinite(scores).all(0).all(0)
        if not bool(own.any()):
            continue
        shares = choice[:, :, own].nanmean((1, 2)).tolist()
        found.append(
            TestLevels(
                kind or ALL,
                int(own.sum()),
                float(questions.majority()[own].mean()),
                _levels(results, scores, questions, own, arms),
                _levels(results, blind["other"], questions, own, arms),
                _levels(results, blind["gray"], questions, own, arms),
                {arm: share for arm, share in zip(arms, shares, strict=True) if share == share},
            )
        )
    return found


def _levels(
    results: StudyResults, scores: Tensor, questions: Questions, own: Tensor, arms: Sequence[str]
) -> dict[str, Level]:
    asked = own & torch.isfinite(scores).all(0).all(0)
    if not bool(asked.any()):
        return {}
    found = levels(scores[:, :, asked], questions.pictures[asked], results.settings.resamples)
    return dict(zip(arms, found, strict=True))


def _pairs(
    scores: Tensor, pictures: Tensor, arms: Sequence[str], pairs: Sequence[tuple[str, str]], resamples: int
) -> list[Contrast]:
    """The differences of pairs on what all arms were asked."""
    if not pairs:
        return []
    asked = torch.isfinite(scores).all(0).all(0)
    return contrasts(scores[:, :, asked], pictures[asked], arms, pairs, resamples)


def _from_start(arms: Sequence[str]) -> list[tuple[str, str]]:
    return [(arm, START) for arm in arms if arm != START] if START in arms else []


def _from_main(results: StudyResults, arms: Sequence[str]) -> list[tuple[str, str]]:
    main = results.settings.roles.main
    return [(main, arm) for arm in arms if arm not in (START, main)] if main in arms else []


def _cost(results: StudyResults, arm: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Cost of an arm: FLOPs of a step as counted, seconds of a step as measured (median of the seeds)."""
    told = [results.result(arm, seed) for seed in seeds]
    seconds = [each["seconds_per_step"] for each in told if each.get("seconds_per_step")]
    flops = [each["flops_per_step"] for each in told if each.get("flops_per_step")]
    return {
        "flops": statistics.mean(flops) if flops else None,
        "seconds": statistics.median(seconds) if seconds else None,
        "weights": told[0].get("trained_weights"),
        "layers": list(dict.fromkeys(str(each.get("layers_named", "")) for each in told)),
        "steps": told[0].get("steps"),
        "equal_step": told[0].get("equal_step"),
    }
