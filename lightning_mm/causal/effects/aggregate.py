"""Averages per-question results over questions, with intervals clustered by image.

Data flow: values by question and layer -> ``layer_means``: one Estimate per layer -> rows of ``Findings``;
``CausalTrace``s -> ``average_traces``: mean over the units of a token class, then over questions, and
``averages_table``: which average is over what; single traces -> ``to_rows``: entries of traces.json.

Shapes: Q questions, N layers, U units of one trace.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mm.causal.effects.activation_patching import MIN_PROBABILITY_DROP, CausalTrace, TraceConfig
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


def ratios_of_means(value_QN: Tensor, fall_Q: Tensor, questions: Sequence[Question], missing: str) -> list[Estimate]:
    """Mean value over mean fall, with its 95 % interval for each layer, clustered by the questions' groups.

    The interval is that of the linearized ratio, the mean of (value - ratio x fall) / mean fall (Cochran 1977, section
    6.4). Questions whose fall is small, or negative, count with what they are: no ratio of one question is taken.

    Args:
        value_QN: Values by question and layer; NaN entries are left out.
        fall_Q: What each question has to regain.
        questions: The Q questions.
        missing: Reason to give for layers without any value.
    """
    group_Q, ratios = group_ids(questions), []
    for value_Q in value_QN.double().T:
        known = ~value_Q.isnan()
        if not known.any():
            ratios.append(Estimate.undefined_because(missing, 0))
            continue
        fall, groups, n = fall_Q[known].double(), group_Q[known], int(known.sum())
        mean, low, _ = (float(end) for end in clustered_mean_interval(fall[None], groups))
        if mean <= 0 or low <= 0:  # an unknown low, with fewer than 3 groups, is NaN
            reason = f"mean fall {mean:.3g} is not clear of 0: nothing to take a share of"
            ratios.append(Estimate.undefined_because(reason, n))
            continue
        ratio = float(value_Q[known].mean()) / mean
        residual_Q = (value_Q[known] - ratio * fall) / mean
        ends = (ratio + float(end) for end in clustered_mean_interval(residual_Q[None], groups)[1:])
        low, high = ends
        ratios.append(Estimate.of(ratio, n, low=low, high=high, null=0.0))
    return ratios


def average_traces(traces: Sequence[CausalTrace]) -> Iterator[tuple[str, str, list[Estimate]]]:
    """Yields measure, ``site/token class`` and one Estimate per layer.

    Over all traces: ``trace_effect``, the mean of the restored less the corrupted probability, which is the quantity of
    Basu et al. 2024; ``trace_restored``, the mean restored probability, which their code stores, with the mean of the
    corrupted runs as its null; ``trace_ratio``, the mean effect over the mean fall. Over traces whose fall is at least
    ``MIN_PROBABILITY_DROP``: ``trace`` and ``trace_logit``, means of each question's ratio, which are noisier. How many
    fall less is in the notes. Every question counts once, however many tokens of a class it has.
    """
    valid = [trace for trace in traces if trace.is_valid]
    small = len(traces) - len(valid)
    note = f"{small} of {len(traces)} questions left out: the corruption hardly changed the answer" if small else ""
    # Those that attribution patching ranks first are not like the others.
    cut = "means over the shortlist only, which is drawn by size of effect"
    short = cut if any(each.restored.isnan().any() for each in traces) else ""
    for measure, values in (
        ("trace", [t.normalized_effect for t in valid]),
        ("trace_logit", [t.normalized_logit_effect for t in valid]),
    ):
        stuck = sum(bool(v.isnan().all()) for v in values)
        left = f"{stuck} of {len(valid)} more left out: the logit difference did not fall" if stuck else ""
        for s, site, name in _places(valid):
            rows = _class_rows([v[s] for v in values], valid, name)
            if rows is not None:
                means = layer_means(rows.value_QN, rows.questions, _MISSING)
                yield measure, f"{site}/{name}", [e.noted(note, left, short) for e in means]
    for s, site, name in _places(traces):
        effect = _class_rows([t.effect[s] for t in traces], traces, name)
        restored = _class_rows([t.restored[s] for t in traces], traces, name)
        if effect is None or restored is None:
            continue
        corrupt_QN = restored.corrupt_Q[:, None].expand_as(restored.value_QN)
        fall_Q = effect.clean_Q - effect.corrupt_Q
        said = _levels(effect.clean_Q, effect.corrupt_Q)
        for measure, estimates in (
            ("trace_effect", layer_means(effect.value_QN, effect.questions, _MISSING)),
            ("trace_restored", layer_means(restored.value_QN, restored.questions, _MISSING, corrupt_QN)),
            ("trace_ratio", ratios_of_means(effect.value_QN, fall_Q, effect.questions, _MISSING)),
        ):
            yield measure, f"{site}/{name}", [e.noted(short, said) for e in estimates]


def averages_table(traces: Sequence[CausalTrace], asked: int, right: int) -> dict[str, Any]:
    """A table of causal.json: which average is whose, over how many questions, and where a small fall counts.

    Args:
        traces: All traces.
        asked: Number of questions that the model was asked.
        right: Number of those that it answered correctly.
    """
    valid = sum(trace.is_valid for trace in traces)
    small, everything = len(traces) - valid, len(traces)
    rows = [
        ["mean effect: restored less corrupted", "trace_effect", "Basu et al. 2024", everything, small],
        ["mean restored probability", "trace_restored", "stored by their code", everything, small],
        ["ratio of means: mean effect / mean fall", "trace_ratio", "ours", everything, small],
        ["mean of ratios: effect / fall", "trace", "ours, drawn as maps", valid, 0],
        ["mean of ratios of logit differences", "trace_logit", "ours", valid, 0],
    ]
    fall = f"less than {MIN_PROBABILITY_DROP:g} of probability"
    note = (
        f"{asked} questions asked, {right} answered right, {everything} of these traced; {small} of them lost {fall} "
        "when corrupted: they count as they are in means over all questions, and have no ratio of their own. A mean of "
        "ratios divides by single falls, and is noisier than a ratio of means."
    )
    columns = ["average", "measure in layers.csv", "whose", "questions", f"of these, with a fall of {fall}"]
    return {"title": "What the averages of traces are over", "columns": columns, "rows": rows, "note": note}


_MISSING = "no question has a number here: nothing on the shortlist, or no fall to share out"


@dataclass(frozen=True)
class _ClassRows:
    """Values of one token class: (Q, N) by question and layer, with the questions' clean and corrupted probability."""

    value_QN: Tensor
    questions: tuple[Question, ...]
    clean_Q: Tensor
    corrupt_Q: Tensor


def _places(traces: Sequence[CausalTrace]) -> Iterator[tuple[int, str, str]]:
    """Yields number and name of every site, with every token class."""
    for s, site in enumerate(traces[0].sites if traces else ()):
        for name in TOKEN_CLASSES:
            yield s, site, name


def _class_rows(values: Sequence[Tensor], traces: Sequence[CausalTrace], name: str) -> _ClassRows | None:
    """Means over the units of one token class, by question and layer; None if no question has such tokens."""
    rows, found = [], []
    for value_NU, trace in zip(values, traces, strict=True):
        inside = [u for u, token_class in enumerate(trace.classes) if token_class == name]
        if inside:
            rows.append(value_NU[:, inside].nanmean(1))
            found.append(trace)
    if not rows:
        return None
    clean_Q, corrupt_Q = torch.tensor([[t.p_clean, t.p_corrupt] for t in found], dtype=torch.float64).T
    return _ClassRows(torch.stack(rows), tuple(t.encoded.question for t in found), clean_Q, corrupt_Q)


def _levels(clean_Q: Tensor, corrupt_Q: Tensor) -> str:
    """Note on the levels of all questions in a mean, and how many of them fall little."""
    small = int((clean_Q - corrupt_Q < MIN_PROBABILITY_DROP).sum())
    clean, corrupt = float(clean_Q.mean()), float(corrupt_Q.mean())
    said = f"of all traced questions the mean probability is {clean:.3f} clean, {corrupt:.3f} corrupted"
    return said + (
        f"; {small} of {len(clean_Q)} fall by less than {MIN_PROBABILITY_DROP:g}, and count" if small else ""
    )


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
