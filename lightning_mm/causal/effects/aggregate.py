"""Traces of many questions into one map: how much each site of each layer carries, by what its token is.

Data flow: ``Trace``s -> mean over the units of a class, then over questions, with an interval -> ``Findings`` rows,
which the dashboards draw; single traces -> rows of traces.json.

Shapes: N layers, U units of one trace, Q questions.

One number per question and layer into one Estimate per layer.

Data flow: what ``attention`` and ``knockout`` measure of every question -> ``profile`` -> rows of ``Findings``.

Shapes: Q questions, N layers.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mm.causal.effects.activation_patching import Trace, Tracing
from lightning_mm.causal.questions.question import TOKEN_CLASSES, Question
from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.resampling import clustered_mean_interval


def group_ids(questions: Sequence[Question]) -> Tensor:
    """(Q,) equal for questions whose numbers depend on one another: those of one picture, mostly."""
    names = [question.group or f"question {question.id}" for question in questions]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.long)


def profile(
    value_QN: Tensor, questions: Sequence[Question], missing: str, null_QN: Tensor | None = None
) -> list[Estimate]:
    """Means over questions with their 95 % intervals, questions of one group counting as dependent.

    Args:
        value_QN: NaN where a question has no such number; it is left out there.
        questions: Q of them.
        missing: Why a layer has no number at all.
        null_QN: What chance would give each; 0 if not given.
    """
    group_Q = group_ids(questions)
    null_QN = torch.zeros_like(value_QN) if null_QN is None else null_QN
    found = []
    for value_Q, null_Q in zip(value_QN.double().T, null_QN.double().T, strict=True):
        known = ~value_Q.isnan()
        if not known.any():
            found.append(Estimate.undefined_because(missing, 0))
            continue
        mean, low, high = (float(end) for end in clustered_mean_interval(value_Q[known][None], group_Q[known]))
        null = float(null_Q[known].mean())
        found.append(Estimate.of(mean, int(known.sum()), low=low, high=high, null=null))
    return found


def averaged(traces: Sequence[Trace]) -> Iterator[tuple[str, str, list[Estimate]]]:
    """Measure, place and one Estimate per layer: the mean normalised indirect effect, 0 where nothing comes back.

    A question counts once, however many tokens of a class it has; the interval treats questions about one picture as
    one. Questions whose corruption took hardly anything are left out, and counted in the notes.
    """
    told = [trace for trace in traces if trace.told]
    note = f"{len(traces) - len(told)} of {len(traces)} questions left out: the corruption hardly changed the answer"
    notes: tuple[str, ...] = (note,) if len(told) < len(traces) else ()
    if any(each.restored.isnan().any() for each in told):
        # Those that attribution patching ranks first are not like the others.
        notes += ("means over the shortlist only, which is drawn by size of effect",)
    for measure, values in (("trace", [t.share for t in told]), ("trace_logit", [t.share_of_logits for t in told])):
        for s, site in enumerate(told[0].sites if told else ()):
            for name in TOKEN_CLASSES:
                profile = _profile([v[s] for v in values], told, name)
                if profile is not None:
                    yield measure, f"{site}/{name}", [e.noted(*notes) for e in profile]


def _profile(values: Sequence[Tensor], traces: Sequence[Trace], name: str) -> list[Estimate] | None:
    """One class of tokens, every layer; None where no question has such tokens."""
    rows, questions = [], []
    for value_NU, trace in zip(values, traces, strict=True):
        inside = [u for u, found in enumerate(trace.classes) if found == name]
        if inside:
            rows.append(value_NU[:, inside].nanmean(1))
            questions.append(trace.asked.question)
    missing = "no question has a number here: nothing on the shortlist, or no fall to share out"
    return profile(torch.stack(rows), questions, missing) if rows else None


def told(trace: Trace, options: Tracing, answer: str, image: str | None) -> Iterator[dict[str, Any]]:
    """One question's maps as rows of traces.json.

    Args:
        trace: What was found.
        options: How.
        answer: The target token, readable.
        image: File of the picture under pictures/; None where it has none.
    """
    question = trace.asked.question
    for s, site in enumerate(trace.sites):
        shown = trace.share if trace.told else trace.effect
        yield {
            "id": question.id,
            "text": question.text,
            "constraint": question.constraint,
            "image": image,
            "site": site,
            "measure": "nie" if trace.told else "ie",
            "window": f"{options.convention}:{options.width}",
            "target": answer,
            "p_clean": trace.p_clean,
            "p_corrupt": trace.p_corrupt,
            "layers": list(range(shown.shape[1])),
            "tokens": [_label(trace, unit) for unit in trace.units],
            "classes": list(trace.classes),
            "positions": [int(unit[0]) for unit in trace.units],
            "sizes": [len(unit) for unit in trace.units],
            "undefined": "not on the shortlist of attribution patching",
            "values": [[None if v != v else round(v, 5) for v in row] for row in shown[s].tolist()],
        }


def _label(trace: Trace, unit: Tensor) -> str:
    first, last = int(unit[0]), int(unit[-1])
    if first in set(trace.asked.image.tolist()):
        return f"picture {first}-{last}"
    return trace.asked.tokens[first]
