"""Averages per-question results over questions, with intervals clustered by image.

Data flow: values by question and layer -> ``layer_means``: one Estimate per layer -> rows of ``Findings``;
``CausalTrace``s -> ``average_traces``: mean over the units of a token class, then over questions; single traces ->
``to_rows``: entries of traces.json.

Shapes: Q questions, N layers, U units of one trace.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mm.causal.effects.activation_patching import CausalTrace, TraceConfig
from lightning_mm.causal.questions.question import TOKEN_CLASSES, Question
from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.resampling import clustered_mean_interval


def group_ids(questions: Sequence[Question]) -> Tensor:
    """(Q,) cluster id of each question: questions of one group, usually one image, are dependent."""
    names = [question.group or f"question {question.id}" for question in questions]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.long)


def layer_means(
    value_QN: Tensor, questions: Sequence[Question], missing: str, null_QN: Tensor | None = None
) -> list[Estimate]:
    """Mean over questions with its 95 % interval for each layer, clustered by the questions' groups.

    Args:
        value_QN: Values by question and layer; NaN entries are left out.
        questions: The Q questions.
        missing: Reason to give for layers without any value.
        null_QN: Expected values under the null hypothesis; None: 0.
    """
    group_Q = group_ids(questions)
    null_QN = torch.zeros_like(value_QN) if null_QN is None else null_QN
    means = []
    for value_Q, null_Q in zip(value_QN.double().T, null_QN.double().T, strict=True):
        known = ~value_Q.isnan()
        if not known.any():
            means.append(Estimate.undefined_because(missing, 0))
            continue
        mean, low, high = (float(end) for end in clustered_mean_interval(value_Q[known][None], group_Q[known]))
        null = float(null_Q[known].mean())
        means.append(Estimate.of(mean, int(known.sum()), low=low, high=high, null=null))
    return means


def average_traces(traces: Sequence[CausalTrace]) -> Iterator[tuple[str, str, list[Estimate]]]:
    """Yields measure, ``site/token class`` and one Estimate per layer.

    ``trace`` and ``trace_logit`` are means of the normalized indirect effect over valid traces; those that are not are
    counted in the notes. ``trace_effect`` is the mean indirect effect over all traces, which is less noisy than a mean
    of ratios, and ``trace_restored`` the mean probability with the site put back (what Basu et al. 2024 store), whose
    null is the mean of the corrupted runs. Every question counts once, however many tokens of a class it has.
    """
    valid = [trace for trace in traces if trace.is_valid]
    note = f"{len(traces) - len(valid)} of {len(traces)} questions left out: the corruption hardly changed the answer"
    notes: tuple[str, ...] = (note,) if len(valid) < len(traces) else ()
    # Those that attribution patching ranks first are not like the others.
    cut = ("means over the shortlist only, which is drawn by size of effect",)
    short = cut if any(each.restored.isnan().any() for each in traces) else ()
    notes += short
    for measure, values in (
        ("trace", [t.normalized_effect for t in valid]),
        ("trace_logit", [t.normalized_logit_effect for t in valid]),
    ):
        for s, site in enumerate(valid[0].sites if valid else ()):
            for name in TOKEN_CLASSES:
                profile = _class_means([v[s] for v in values], valid, name)
                if profile is not None:
                    yield measure, f"{site}/{name}", [e.noted(*notes) for e in profile]
    for s, site in enumerate(traces[0].sites if traces else ()):
        for name in TOKEN_CLASSES:
            effect = _class_means([t.effect[s] for t in traces], traces, name)
            restored = _class_means([t.restored[s] for t in traces], traces, name, [t.p_corrupt for t in traces])
            if effect is not None and restored is not None:
                clean = sum(t.p_clean for t in traces) / len(traces)
                corrupt = sum(t.p_corrupt for t in traces) / len(traces)
                said = f"of all traced questions the mean probability is {clean:.3f} clean, {corrupt:.3f} corrupted"
                yield "trace_effect", f"{site}/{name}", [e.noted(*short, said) for e in effect]
                yield "trace_restored", f"{site}/{name}", [e.noted(*short, said) for e in restored]


def _class_means(
    values: Sequence[Tensor], traces: Sequence[CausalTrace], name: str, nulls: Sequence[float] | None = None
) -> list[Estimate] | None:
    """Means of one token class by layer, with one null per trace (None: 0); None if no question has such tokens."""
    rows, questions, null_Q = [], [], []
    for number, (value_NU, trace) in enumerate(zip(values, traces, strict=True)):
        inside = [u for u, token_class in enumerate(trace.classes) if token_class == name]
        if inside:
            rows.append(value_NU[:, inside].nanmean(1))
            questions.append(trace.encoded.question)
            null_Q.append(0.0 if nulls is None else nulls[number])
    missing = "no question has a number here: nothing on the shortlist, or no fall to share out"
    if not rows:
        return None
    value_QN = torch.stack(rows)
    return layer_means(value_QN, questions, missing, torch.tensor(null_Q)[:, None].expand_as(value_QN))


def to_rows(trace: CausalTrace, config: TraceConfig, answer: str, image: str | None) -> Iterator[dict[str, Any]]:
    """Yields one trace as entries of traces.json, one per site.

    Args:
        trace: The trace.
        config: How it was made.
        answer: Text of the target token.
        image: File name of the image under pictures/; None: no image is shown.
    """
    question = trace.encoded.question
    for s, site in enumerate(trace.sites):
        effect = trace.normalized_effect if trace.is_valid else trace.effect
        yield {
            "id": question.id,
            "text": question.text,
            "constraint": question.constraint,
            "image": image,
            "site": site,
            "measure": "nie" if trace.is_valid else "ie",
            "window": f"{config.convention}:{config.width}",
            "target": answer,
            "p_clean": trace.p_clean,
            "p_corrupt": trace.p_corrupt,
            "layers": list(range(effect.shape[1])),
            "tokens": [_unit_label(trace, unit) for unit in trace.units],
            "classes": list(trace.classes),
            "positions": [int(unit[0]) for unit in trace.units],
            "sizes": [len(unit) for unit in trace.units],
            "undefined": "not on the shortlist of attribution patching",
            "values": [[None if v != v else round(v, 5) for v in row] for row in effect[s].tolist()],
        }


def _unit_label(trace: CausalTrace, unit: Tensor) -> str:
    first, last = int(unit[0]), int(unit[-1])
    if first in set(trace.encoded.image.tolist()):
        return f"picture {first}-{last}"
    return trace.encoded.tokens[first]
