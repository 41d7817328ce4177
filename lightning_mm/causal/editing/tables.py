"""Edits told: tables for people, and every number for programs.

Data flow: ``EditStudy`` + ``Outcome``s -> ``tables`` (causal.json, the console) and ``details`` (edits.json).
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lightning_mm.causal.editing.metrics import loss_change, scores_of
from lightning_mm.causal.editing.multedit import EditOptions
from lightning_mm.causal.editing.study import Apply, Case, EditStudy, LayerScore, Outcome
from lightning_mm.causal.editing.weight_edit import Edit
from lightning_mm.core.estimate import Estimate

_WAYS: dict[Apply, str] = {"each": "Each edit alone", "together": "All edits at once"}
_LOSS, _RISE = "loss per token, general task", "rise of that loss"


def tables(
    study: EditStudy, outcomes: Sequence[Outcome], scan: Sequence[LayerScore], layer: int, options: EditOptions
) -> list[dict[str, Any]]:
    """What was measured, what each question is answered with, and how layers compare; cells are text."""
    made = [_measured([o for o in outcomes if o.apply == way], layer, options) for way in _ways(outcomes)]
    made.append(_answers(study, outcomes, layer, options))
    return made + ([_layers(scan, study)] if scan else [])


def details(
    study: EditStudy, outcomes: Sequence[Outcome], scan: Sequence[LayerScore], layer: int, options: EditOptions
) -> dict[str, Any]:
    """Everything, in JSON's types."""
    return {
        "layer": layer,
        "options": asdict(options),
        "edits": [_edit(study, case, layer, options) for case in study.cases],
        "outcomes": [_outcome(outcome) for outcome in outcomes],
        "layers": [asdict(each) for each in scan],
    }


def measures(outcome: Outcome) -> dict[str, Estimate]:
    """All of one outcome; what was not asked is undefined, with the reason."""
    loss, rise = loss_change(outcome.before, outcome.after, outcome.groups)
    return {**scores_of(outcome.scores), _LOSS: loss, _RISE: rise}


def _ways(outcomes: Sequence[Outcome]) -> list[Apply]:
    return list(dict.fromkeys(outcome.apply for outcome in outcomes))


def _measured(outcomes: Sequence[Outcome], layer: int, options: EditOptions) -> dict[str, Any]:
    found = [measures(outcome) for outcome in outcomes]
    rows = []
    for name, first in found[0].items():
        if all(each[name].value is None for each in found):
            continue
        before = "" if first.null is None else f"{first.null:.3g}"
        rows.append([name, str(first.n), before, *(_cell(each[name]) for each in found)])
    left_out = [f"{name} ({e.undefined})" for name, e in found[0].items() if e.value is None]
    norms = [sum(float(edit.change().norm()) for edit in o.edits) / len(o.edits) for o in outcomes]
    sizes = ", ".join(f"{o.method} {norm:.3g}" for o, norm in zip(outcomes, norms, strict=True))
    limit = "no clamp" if options.limit == float("inf") else f"clamp {options.limit:g}"
    note = (
        f"Layer {layer}, {limit}, at most {options.steps} steps, target: {options.target}. Brackets: 95 % interval, "
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


def _answers(study: EditStudy, outcomes: Sequence[Outcome], layer: int, options: EditOptions) -> dict[str, Any]:
    shown = [outcome for outcome in outcomes if outcome.method == "MultEdit"]
    told = [_edit(study, case, layer, options) for case in study.cases]
    columns = ["question", "constraint", "before", "wanted", *(_WAYS[outcome.apply].lower() for outcome in shown)]
    rows = [
        [
            each["question"],
            each["constraint"],
            each["answer_before"],
            each["new_answer"],
            *(outcome.answers[each["id"]] for outcome in shown),
        ]
        for each in told
    ]
    return {"title": "Answers", "columns": columns, "rows": rows, "note": "What greedy decoding writes."}


def _layers(scan: Sequence[LayerScore], study: EditStudy) -> dict[str, Any]:
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


def _edit(study: EditStudy, case: Case, layer: int, options: EditOptions) -> dict[str, Any]:
    found = study.association(case, layer, options)
    question, probe = case.rewrite.question, case.probes[0]
    return {
        "id": question.id,
        "question": question.text,
        "constraint": question.constraint,
        "image": question.images[0].name if question.images else None,
        "answer": question.answer,
        "answer_before": probe.old.answer,
        "right_before": case.right,
        "new_answer": case.rewrite.new_answer,
        "tokens": len(case.target.ids),
        "losses": list(found.losses),
        "value": float(found.output.norm()),
        "delta": float(found.delta.norm()),
        "key": float(found.key.norm()),
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "method": outcome.method,
        "apply": outcome.apply,
        "measures": {name: asdict(estimate) for name, estimate in measures(outcome).items()},
        "answers": outcome.answers,
        "weights": [_weight(edit) for edit in outcome.edits],
        "scores": [asdict(score) for score in outcome.scores],
    }


def _weight(edit: Edit) -> dict[str, Any]:
    return {
        "module": edit.module,
        "norm": float(edit.change().norm()),
        "rounding": edit.rounding,
        "misses": list(edit.misses),
    }
