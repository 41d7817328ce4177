"""Runs all causal analyses of a model on a set of questions, for the dashboards.

Data flow: ``Answer``s -> causal traces, attention flow, knockout, ablation, image overlays, failure predictor ->
``StudyResult``: rows of layers.csv, entries of traces.json and pictures.json, tables of causal.json. A part that fails
is reported as a problem; the others go on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_mm.analysis.findings import Findings
from lightning_mm.causal.effects.activation_patching import (
    MIN_PROBABILITY_DROP,
    CausalTrace,
    TraceConfig,
    causal_trace,
)
from lightning_mm.causal.effects.aggregate import average_traces, averages_table, to_rows
from lightning_mm.causal.effects.attention_flow import FLOW_EDGES, flow_curves
from lightning_mm.causal.effects.attention_knockout import check_edge
from lightning_mm.causal.effects.failure_predictor import contribution_features, predict_failure
from lightning_mm.causal.effects.image_overlays import PictureGrids, contribution_map
from lightning_mm.causal.effects.knockout_curves import KnockoutConfig, knockout_curves
from lightning_mm.causal.effects.layer_ablation import ABLATIONS, ablation_curves
from lightning_mm.causal.effects.logit_lens import picture_words
from lightning_mm.causal.interventions.activation_cache import cache_activations
from lightning_mm.causal.interventions.corruption import CORRUPTIONS, CorruptionKind, Places, corrupt_question
from lightning_mm.causal.questions.scoring import Answer
from lightning_mm.core.decisions import log, log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.sample import Rejection
from lightning_mm.models.handle import MultimodalModel

PARTS = ("trace", "flow", "knockout", "ablation", "pictures", "predictor")


@dataclass(frozen=True)
class StudyConfig:
    """Which analyses to run, and how.

    Args:
        parts: Analyses to run, of ``PARTS``.
        corruption: Corruption of the traces: token, symmetric, image, gaussian or grey.
        trace: Settings of causal tracing.
        knockout: Settings of attention knockout.
        ablations: Kinds of layer ablation, of ``ABLATIONS``.
        num_ablated: Largest number of questions that layers are ablated for; each needs full runs.
        num_shown: Largest number of questions whose trace maps and image overlays are kept.
        seed: Seed of the corruptions.
        flow: Edges whose attention flow is measured, such as ``image->last`` or ``image_late->constraint`` (the last
            sixteenth of the picture's tokens).
        places: Which places of a constraint are corrupted: all, or the first alone, as in 2406.04236's code.
    """

    parts: tuple[str, ...] = PARTS
    corruption: CorruptionKind = "token"
    trace: TraceConfig = field(default_factory=TraceConfig)
    knockout: KnockoutConfig = field(default_factory=KnockoutConfig)
    ablations: tuple[str, ...] = tuple(ABLATIONS)
    num_ablated: int = 16
    num_shown: int = 12
    seed: int = 0
    flow: tuple[str, ...] = FLOW_EDGES
    places: Places = "all"

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"There is no part {part!r}.", f"There are {', '.join(PARTS)}.", "Name those.")
        for edge in self.flow:
            check_edge(edge)
        if self.corruption not in CORRUPTIONS:
            raise UserError(
                f"There is no corruption {self.corruption!r}.",
                "It is not one of ours.",
                f"Use {', '.join(CORRUPTIONS)}.",
            )

    @classmethod
    def p2(cls, width: int = 1) -> "StudyConfig":
        """Settings of the code released with Basu et al. 2024, arXiv:2406.04236; its prompt is ``P2_PROMPT``.

        Args:
            width: w of the window: one layer for 1, else the 2w + 1 layers from l - w to l + w that exist.
        """
        return cls(corruption="token", places="first", trace=TraceConfig(width=width, convention="p2"))


@dataclass
class StudyResult:
    """Results of a study.

    Args:
        findings: Averages by layer.
        traces: The trace of each question that could be traced.
        maps: Entries of traces.json.
        pictures: Entries of pictures.json.
        tables: Tables of causal.json.
        rejected: Questions that a part could not use, with reasons.
    """

    findings: Findings
    traces: list[CausalTrace] = field(default_factory=list)
    maps: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


def run_study(
    mm: MultimodalModel, answers: Sequence[Answer], config: StudyConfig, images: Mapping[str, str], step: int = 0
) -> StudyResult:
    """Run the configured analyses.

    Args:
        mm: The unwrapped model in eval mode, with its processor.
        answers: Questions and their answers; incorrectly answered ones are used by the failure predictor only.
        config: Which analyses to run, and how.
        images: Question id -> file name of its image beside the report; questions without one get no overlays.
        step: Number of optimizer steps done.
    """
    result = StudyResult(Findings(step))
    correct = [answer for answer in answers if answer.right]
    add = result.findings.add

    def flow() -> None:
        for site, estimates in flow_curves(mm, [answer.encoded for answer in correct], config.flow):
            add("causal", "flow", site, estimates, first=0)

    def knockout() -> None:
        for measure, site, estimates in knockout_curves(mm, correct, config.knockout):
            add("causal", measure, site, estimates, first=0)

    def ablation() -> None:
        for kind, estimates in ablation_curves(mm, correct[: config.num_ablated], config.ablations):
            add("causal", "ablation", kind, estimates, first=0)

    parts: dict[str, Callable[[], None]] = {
        "trace": lambda: _add_traces(result, mm, answers, config, images),
        "flow": flow,
        "knockout": knockout,
        "ablation": ablation,
        "pictures": lambda: _add_overlays(result, mm, correct[: config.num_shown], images),
        "predictor": lambda: _add_predictor(result, mm, answers),
    }
    for name in config.parts:
        try:
            parts[name]()
        except UserError as error:
            result.findings.problems.append(f"{name}: {error.what} {error.why}")
            log.warning("%s is left out: %s %s", name, error.what, error.why)
    return result


def _add_traces(
    result: StudyResult,
    mm: MultimodalModel,
    answers: Sequence[Answer],
    config: StudyConfig,
    images: Mapping[str, str],
) -> None:
    """Trace all questions answered correctly; add traces, averages, and the maps of those with the largest drop."""
    correct = [answer for answer in answers if answer.right]
    refused = _trace_questions(result, mm, correct, config)
    if refused is not None and not result.traces:
        raise refused
    if not any(trace.is_valid for trace in result.traces):
        first = f"; {result.rejected[0].reason}" if result.rejected else ""
        problem = (
            f"trace: no mean of ratios: of {len(correct)} questions {len(result.traces)} could be corrupted, and none "
            f"of them lost {MIN_PROBABILITY_DROP:.0%} of its answer's probability{first}"
        )
        result.findings.problems.append(problem)
        log.warning("%s", problem)
    for measure, site, estimates in average_traces(result.traces):
        result.findings.add("causal", measure, site, estimates, first=0)
    if result.traces:
        result.tables.append(averages_table(result.traces, len(answers), len(correct)))
    decode = mm.required_processor.processor.tokenizer.decode
    for trace in sorted(result.traces, key=lambda each: each.p_corrupt - each.p_clean)[: config.num_shown]:
        image = images.get(trace.encoded.question.id)
        result.maps += to_rows(trace, config.trace, decode([trace.target]), image)


def _trace_questions(
    result: StudyResult, mm: MultimodalModel, correct: Sequence[Answer], config: StudyConfig
) -> UserError | None:
    """Add the traces and rejections of all questions; returns the last error, if any question was refused."""
    donors = [answer.encoded for answer in correct]
    refused: UserError | None = None
    for number, answer in enumerate(correct):
        corrupted = corrupt_question(
            answer.encoded,
            config.corruption,
            donors,
            mm.required_processor,
            mm,
            config.seed,
            places=config.places,
        )
        if isinstance(corrupted, Rejection):
            result.rejected.append(corrupted)
            continue
        try:
            result.traces.append(causal_trace(mm, answer.encoded, corrupted, config.trace, answer.target))
        except UserError as error:
            refused = error
            result.rejected.append(Rejection(answer.encoded.question.id, f"not traced: {error.why}"))
        if (number + 1) % 10 == 0 or number + 1 == len(correct):
            log.info("traced %d of %d questions", number + 1, len(correct))
    return refused


def _add_overlays(
    result: StudyResult, mm: MultimodalModel, correct: Sequence[Answer], images: Mapping[str, str]
) -> None:
    """Add contributions of the image and logit-lens words of its tokens, at five depths."""
    processor = mm.required_processor
    grids, decode = PictureGrids(processor), processor.processor.tokenizer.decode
    last = mm.layout.num_layers - 1
    depths = sorted({round(part * last / 4) for part in range(5)})
    for answer in correct:
        encoded = answer.encoded
        if encoded.question.id not in images:
            continue
        try:
            grid = grids.grid(encoded)
            cache = cache_activations(mm, encoded.inputs, sites=("residual", "attention"))
            to = "constraint" if len(encoded.constraint) else "last"
            entries = [contribution_map(mm, cache, encoded, grid, layer, to) for layer in depths]
            entries += [picture_words(mm, cache, encoded, grid, layer, decode) for layer in depths]
        except UserError as error:
            result.rejected.append(Rejection(encoded.question.id, f"not drawn: {error.why}"))
            continue
        result.pictures += [{**entry, "image": images[encoded.question.id]} for entry in entries]


def _add_predictor(result: StudyResult, mm: MultimodalModel, answers: Sequence[Answer]) -> None:
    """Add the table of the failure predictor; needs questions with a constraint and an answer."""
    usable = [a for a in answers if len(a.encoded.constraint) and a.encoded.question.answer is not None]
    if not usable:
        log_decision("causal.predictor", "not made", "no question has both a constraint and a right answer")
        return
    features = []
    for answer in usable:
        cache = cache_activations(mm, answer.encoded.inputs, sites=("attention",))
        features.append(contribution_features(mm, cache, answer.encoded))
    confidence = torch.tensor([answer.confidence for answer in usable])
    right = torch.tensor([answer.right for answer in usable])
    questions = [answer.encoded.question for answer in usable]
    result.tables.append(predict_failure(torch.stack(features), confidence, right, questions).table())
