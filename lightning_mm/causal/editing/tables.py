"""Results of edits as tables for people and as JSON for programs.

Data flow: ``EditStudy`` + ``EditOutcome``s -> ``tables`` (causal.json, the console) and ``details`` (edits.json).
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lightning_mm.causal.editing.metrics import edit_measures, loss_change
from lightning_mm.causal.editing.multedit import EditConfig
from lightning_mm.causal.editing.study import Apply, EditCase, EditOutcome, EditStudy, LayerScore
from lightning_mm.causal.editing.weight_edit import WeightEdit
from lightning_mm.core.estimate import Estimate

_WAYS: dict[Apply, str] = {"each": "Each edit alone", "together": "All edits at once"}
_LOSS, _RISE = "loss per token, general task", "rise of that loss"


def tables(
    study: EditStudy, outcomes: Sequence[EditOutcome], scan: Sequence[LayerScore], layer: int, config: EditConfig
) -> list[dict[str, Any]]:
    """Tables of the measures, of the answers, and of the layers that were tried; cells are text."""
    ways = list(dict.fromkeys(outcome.apply for outcome in outcomes))
    measured = [_measures_table([o for o in outcomes if o.apply == way], layer, config) for way in ways]
    return [*measured, _answers_table(study, outcomes), *([_layers_table(scan)] if scan else [])]


def details(
    study: EditStudy, outcomes: Sequence[EditOutcome], scan: Sequence[LayerScore], layer: int, config: EditConfig
) -> dict[str, Any]:
    """All results as JSON types, the contents of edits.json."""
    return {
        "layer": layer,
        "options": asdict(config),
        "edits": [_edit(study, case, layer, config) for case in study.cases],
        "outcomes": [_outcome(outcome) for outcome in outcomes],
        "layers": [asdict(each) for each in scan],
    }


def measures(outcome: EditOutcome) -> dict[str, Estimate]:
    """All measures of one outcome; those without probes are undefined, with the reason."""
    loss, rise = loss_change(outcome.before, outcome.after, outcome.groups)
    return {**edit_measures(outcome.scores), _LOSS: loss, _RISE: rise}


def _measures_table(outcomes: Sequence[EditOutcome], layer: int, config: EditConfig) -> dict[str, Any]:
    results = [measures(outcome) for outcome in outcomes]
    rows = []
    for name, first in results[0].items():
        if all(each[name].value is None for each in results):
            continue
        before = "" if first.null is None else f"{first.null:.3g}"
        rows.append([name, str(first.n), before, *(_cell(each[name]) for each in results)])
    left_out = [f"{name} ({e.undefined})" for name, e in results[0].items() if e.value is None]
    norms = [sum(float(edit.change().norm()) for edit in o.edits) / len(o.edits) for o in outcomes]
    sizes = ", ".join(f"{o.method} {norm:.3g}" for o, norm in zip(outcomes, norms, strict=True))
    limit = "no clamp" if config.limit == float("inf") else f"clamp {config.limit:g}"
    note = (
        f"Layer {layer}, {limit}, at most {config.steps} steps, target: {config.target}, "
        f"key at the constraint's {config.place} place. Brackets: 95 % interval, "
        f"questions of one group together. Norm of the change: {sizes}."
        + (f" Not measured: {', '.join(left_out)}." if left_out else "")
    )
    columns = ["measure", "n", "before", *(outcome.method for outcome in outcomes)]
    return {"title": _WAYS[outcomes[0].apply], "columns": columns, "rows": rows, "note": note}


def _cell(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3g}"
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def _answers_table(study: EditStudy, outcomes: Sequence[EditOutcome]) -> dict[str, Any]:
    multedits = [outcome for outcome in outcomes if outcome.method == "MultEdit"]
    columns = ["question", "constraint", "before", "wanted", *(_WAYS[outcome.apply].lower() for outcome in multedits)]
    rows = [
        [
            case.request.question.text,
            case.request.question.constraint,
            case.probes[0].old.answer,
            case.request.new_answer,
            *(outcome.answers[case.request.question.id] for outcome in multedits),
        ]
        for case in study.cases
    ]
    return {"title": "Answers", "columns": columns, "rows": rows, "note": "What greedy decoding writes."}


def _layers_table(scan: Sequence[LayerScore]) -> dict[str, Any]:
    rows = [
        [
            str(each.layer),
            f"{each.overall:.3g}",
            f"{each.efficacy:.3g}",
            f"{each.log_prob:.3g}",
            "-" if each.kept is None else f"{each.kept:.3g}",
            f"{each.steps:.3g}",
        ]
        for each in scan
    ]
    note = (
        "First edits only, each alone. Score: harmonic mean of efficacy, generalisation and specificity, as far as "
        "they were asked. The layer was chosen by these edits, which are among those measured above."
    )
    columns = ["layer", "score", "efficacy", "log p(new answer)", "answers kept", "steps"]
    return {"title": "By layer", "columns": columns, "rows": rows, "note": note}


def _edit(study: EditStudy, case: EditCase, layer: int, config: EditConfig) -> dict[str, Any]:
    association = study.association(case, layer, config)
    question, probe = case.request.question, case.probes[0]
    return {
        "id": question.id,
        "question": question.text,
        "constraint": question.constraint,
        "image": question.images[0].name if question.images else None,
        "answer": question.answer,
        "answer_before": probe.old.answer,
        "right_before": case.right,
        "new_answer": case.request.new_answer,
        "tokens": len(case.target.ids),
        "losses": list(association.losses),
        "value": float(association.output.norm()),
        "delta": float(association.delta.norm()),
        "key": float(association.key.norm()),
    }


def _outcome(outcome: EditOutcome) -> dict[str, Any]:
    return {
        "method": outcome.method,
        "apply": outcome.apply,
        "measures": {name: asdict(estimate) for name, estimate in measures(outcome).items()},
        "answers": outcome.answers,
        "weights": [_weight(edit) for edit in outcome.edits],
        "scores": [asdict(score) for score in outcome.scores],
    }


def _weight(edit: WeightEdit) -> dict[str, Any]:
    return {
        "module": edit.module,
        "norm": float(edit.change().norm()),
        "rounding": edit.rounding,
        "misses": list(edit.misses),
    }
