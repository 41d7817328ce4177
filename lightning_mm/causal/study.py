"""Everything that interventions tell of a model on a set of questions, as what the dashboards draw.

Data flow: ``Answer``s -> traces, flow, knockout, ablation, pictures, predictor -> ``Study``: rows of layers.csv,
entries of traces.json and pictures.json, tables of causal.json. A part that cannot be had is told; the others go on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_mm.analysis.findings import Findings
from lightning_mm.causal.effects.activation_patching import LEAST_FALL, Trace, Tracing, trace
from lightning_mm.causal.effects.aggregate import averaged, told
from lightning_mm.causal.effects.attention_flow import flow
from lightning_mm.causal.effects.failure_predictor import contribution_features, predict_failure
from lightning_mm.causal.effects.image_overlays import PictureGrids, image_map
from lightning_mm.causal.effects.knockout_curves import Knocking, knockout_curves
from lightning_mm.causal.effects.layer_ablation import KINDS, ablation_curves
from lightning_mm.causal.effects.logit_lens import picture_words
from lightning_mm.causal.interventions.activation_cache import record
from lightning_mm.causal.interventions.corruption import KINDS as CORRUPTIONS
from lightning_mm.causal.interventions.corruption import CorruptionKind, corrupted
from lightning_mm.causal.questions.scoring import Answer
from lightning_mm.core.decisions import decide, log
from lightning_mm.core.errors import UserError
from lightning_mm.data.sample import Rejection
from lightning_mm.models.handle import MultimodalModel

PARTS = ("trace", "flow", "knockout", "ablation", "pictures", "predictor")


@dataclass(frozen=True)
class Studying:
    """What to find out.

    Args:
        parts: Of ``PARTS``.
        corruption: What traces take away: token, symmetric, image, gaussian or grey.
        tracing: How to trace.
        knocking: Which edges to knock out.
        ablations: Kinds of ablation.
        ablated: Questions whose layers are ablated; whole runs are computed for it.
        shown: Questions whose single maps and pictures are kept.
        seed: Of corruptions.
    """

    parts: tuple[str, ...] = PARTS
    corruption: CorruptionKind = "token"
    tracing: Tracing = field(default_factory=Tracing)
    knocking: Knocking = field(default_factory=Knocking)
    ablations: tuple[str, ...] = tuple(KINDS)
    ablated: int = 16
    shown: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"There is no part {part!r}.", f"There are {', '.join(PARTS)}.", "Name those.")
        if self.corruption not in CORRUPTIONS:
            raise UserError(
                f"There is no corruption {self.corruption!r}.",
                "It is not one of ours.",
                f"Use {', '.join(CORRUPTIONS)}.",
            )


@dataclass
class Study:
    """What was found.

    Args:
        findings: Averages by layer.
        traces: Of each question that could be traced.
        maps: Entries of traces.json.
        pictures: Entries of pictures.json.
        tables: Of causal.json.
        rejected: Questions that a part could not use, and why.
    """

    findings: Findings
    traces: list[Trace] = field(default_factory=list)
    maps: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


def study(
    mm: MultimodalModel, answers: Sequence[Answer], options: Studying, images: Mapping[str, str], step: int = 0
) -> Study:
    """Find out all that is asked for.

    Args:
        mm: The plain model in eval mode, with its processor.
        answers: Questions; those answered wrong are for the predictor only.
        options: What to find out.
        images: Question id -> file of its picture beside the report.
        step: Optimizer steps done.
    """
    found = Study(Findings(step))
    right = [answer for answer in answers if answer.right]
    parts: dict[str, Callable[[], None]] = {
        "trace": lambda: _trace(found, mm, right, options, images),
        "flow": lambda: _flow(found, mm, right),
        "knockout": lambda: _knockout(found, mm, right, options),
        "ablation": lambda: _ablation(found, mm, right[: options.ablated], options.ablations),
        "pictures": lambda: _pictures(found, mm, right[: options.shown], images),
        "predictor": lambda: _predictor(found, mm, answers),
    }
    for name in options.parts:
        try:
            parts[name]()
        except UserError as error:
            found.findings.problems.append(f"{name}: {error.what} {error.why}")
            log.warning("%s is left out: %s %s", name, error.what, error.why)
    return found


def _trace(
    found: Study, mm: MultimodalModel, right: Sequence[Answer], options: Studying, images: Mapping[str, str]
) -> None:
    every, tokenizer = [answer.asked for answer in right], mm.required_processor.processor.tokenizer
    refused: UserError | None = None
    for number, answer in enumerate(right):
        corrupt = corrupted(
            answer.asked,
            options.corruption,
            every,
            mm.required_processor,
            mm,
            options.seed,
        )
        if isinstance(corrupt, Rejection):
            found.rejected.append(corrupt)
            continue
        try:
            found.traces.append(trace(mm, answer.asked, corrupt, options.tracing, answer.target))
        except UserError as error:
            refused = error
            found.rejected.append(Rejection(answer.asked.question.id, f"not traced: {error.why}"))
        if (number + 1) % 10 == 0 or number + 1 == len(right):
            log.info("traced %d of %d questions", number + 1, len(right))
    if refused is not None and not found.traces:
        raise refused
    if not any(each.told for each in found.traces):
        first = f"; {found.rejected[0].reason}" if found.rejected else ""
        told_why = (
            f"trace: no average: of {len(right)} questions {len(found.traces)} could be corrupted, and none of them "
            f"lost {LEAST_FALL:.0%} of its answer's probability{first}"
        )
        found.findings.problems.append(told_why)
        log.warning("%s", told_why)
    for measure, site, estimates in averaged(found.traces):
        found.findings.add("causal", measure, site, estimates, first=0)
    clearest = sorted(found.traces, key=lambda each: each.p_corrupt - each.p_clean)[: options.shown]
    for each in clearest:
        answer_text = tokenizer.decode([each.target])
        found.maps += told(each, options.tracing, answer_text, images.get(each.asked.question.id))


def _flow(found: Study, mm: MultimodalModel, right: Sequence[Answer]) -> None:
    for name, estimates in flow(mm, [answer.asked for answer in right]):
        found.findings.add("causal", "flow", name, estimates, first=0)


def _knockout(found: Study, mm: MultimodalModel, right: Sequence[Answer], options: Studying) -> None:
    for measure, site, estimates in knockout_curves(mm, right, options.knocking):
        found.findings.add("causal", measure, site, estimates, first=0)


def _ablation(found: Study, mm: MultimodalModel, right: Sequence[Answer], kinds: Sequence[str]) -> None:
    for kind, estimates in ablation_curves(mm, right, kinds):
        found.findings.add("causal", "ablation", kind, estimates, first=0)


def _pictures(found: Study, mm: MultimodalModel, right: Sequence[Answer], images: Mapping[str, str]) -> None:
    """What the picture gives and what the lens reads off it, at five depths."""
    processor = mm.required_processor
    grids, decode = PictureGrids(processor), processor.processor.tokenizer.decode
    last = mm.layout.num_layers - 1
    depths = sorted({round(part * last / 4) for part in range(5)})
    for answer in right:
        asked = answer.asked
        if asked.question.id not in images:
            continue
        try:
            grid = grids.grid(asked)
            recording = record(mm, asked.inputs, sites=("residual", "attention"))
            to = "constraint" if len(asked.constraint) else "last"
            entries = [image_map(mm, recording, asked, grid, layer, to) for layer in depths]
            entries += [picture_words(mm, recording, asked, grid, layer, decode) for layer in depths]
        except UserError as error:
            found.rejected.append(Rejection(asked.question.id, f"not drawn: {error.why}"))
            continue
        found.pictures += [{**entry, "image": images[asked.question.id]} for entry in entries]


def _predictor(found: Study, mm: MultimodalModel, answers: Sequence[Answer]) -> None:
    usable = [a for a in answers if len(a.asked.constraint) and a.asked.question.answer is not None]
    if not usable:
        decide("causal.predictor", "not made", "no question has both a constraint and a right answer")
        return
    features = []
    for answer in usable:
        recording = record(mm, answer.asked.inputs, sites=("attention",))
        features.append(contribution_features(mm, recording, answer.asked))
    confidence = torch.tensor([answer.confidence for answer in usable])
    right = torch.tensor([answer.right for answer in usable])
    questions = [answer.asked.question for answer in usable]
    found.tables.append(predict_failure(torch.stack(features), confidence, right, questions).table())
