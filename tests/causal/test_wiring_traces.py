"""Every row of ``traces.json`` and of traces in ``layers.csv``, recomputed by plain forward hooks on whole runs.

Tolerances: whole runs of float32 against recomputed parts of them, 2e-4 of a probability that spans 0 to 1, over the
fall where an effect is a share of it; ``traces.json`` rounds to 5 digits.

Shapes: S sites, N layers, U units (a token, or a run of image tokens).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mm.causal.effects.activation_patching import TraceConfig
from tests.helpers.plain_causal import PlainQuestion
from tests.helpers.plain_questions import CLASSES, FAMILIES, IMAGE_UNITS, LAYERS, SITES, Traced, check
from tests.helpers.plain_states import PlainModel


def word_of_corruption(plain: PlainModel) -> int:
    """The first token of "Paris" within a sentence."""
    tokenizer, reached = plain.processor.tokenizer, 0
    for token in tokenizer("the Paris", add_special_tokens=False)["input_ids"]:
        reached += len(tokenizer.decode([token]))
        if reached > len("the "):
            return int(token)
    raise AssertionError


def with_word(one: Traced, number: int) -> dict[str, torch.Tensor]:
    """Every constraint token is the first token of "Paris"."""
    asked = one.asked[number]
    ids = asked.inputs["input_ids"].clone()
    ids[0, asked.parts["constraint"]] = word_of_corruption(asked.plain)
    return {**asked.inputs, "input_ids": ids}


def with_other_picture(one: Traced, number: int) -> dict[str, torch.Tensor] | None:
    """The picture of another question of as many image tokens, drawn by the question's id; None where there is none."""
    asked = one.asked[number]
    others = sorted(range(len(one.asked)), key=lambda i: one.asked[i].id)
    random.Random(f"0:image:{asked.id}").shuffle(others)
    for other in (one.asked[i] for i in others):
        same = len(other.pictures) == len(asked.pictures) > 0 and len(other.row.image) == len(asked.row.image)
        if same and other.pictures != asked.pictures:
            pixels = {k: v for k, v in other.inputs.items() if v.shape[:2] != other.inputs["input_ids"].shape}
            return {**asked.inputs, **pixels}
    return None


def units_of(asked: PlainQuestion, first: int) -> list[list[int]]:
    """Text tokens one by one and the image tokens in a few runs, from the first token that the corruption changes."""
    image = [at for at in asked.parts["image"] if at >= first]
    runs = [run.tolist() for run in np.array_split(image, IMAGE_UNITS) if len(run)] if image else []
    text = [[at] for at in range(first, asked.length) if at not in asked.parts["image"]]
    return sorted(runs + text)


CORRUPTIONS: dict[str, Any] = {
    "token": (with_word, {"width": 1, "convention": "p2"}, lambda layer: [layer]),
    "image": (
        with_other_picture,
        {"width": 2, "convention": "rome"},
        lambda layer: [each for each in (layer - 1, layer) if each >= 0],
    ),
}


@dataclass(frozen=True)
class PlainTrace:
    """One question's trace by whole runs with hooks.

    Args:
        target: The token that is followed.
        units: Token positions of each of the U units.
        p: Probability of the target, clean.
        q: The same, corrupted.
        drop: Logit of the target minus that of the corrupted run's answer, clean minus corrupted.
        restored: (S, N, U) probability with a unit restored.
        gained: (S, N, U) increase of that difference of logits over the corrupted run.
    """

    target: int
    units: list[list[int]]
    p: float
    q: float
    drop: float
    restored: Any
    gained: Any

    @property
    def is_valid(self) -> bool:
        return self.p - self.q >= 0.05


def trace_by_hooks(one: Traced, number: int, kind: str, corrupt: dict[str, torch.Tensor]) -> PlainTrace:
    asked, window = one.asked[number], CORRUPTIONS[kind][2]
    target, clean, fallen = one.target(number), one.clean(number), one.runs.logits(corrupt)[0]
    best, second = fallen.topk(2).indices.tolist()
    rival = second if best == target else best

    def read(logits: torch.Tensor) -> Any:
        return torch.stack([logits.softmax(-1)[..., target], logits[..., target] - logits[..., rival]]).numpy()

    units = units_of(asked, min(asked.parts["constraint"] if kind == "token" else asked.parts["image"]))
    found = np.empty((2, len(SITES), LAYERS, len(units)))
    for s, site in enumerate(SITES):
        kept = one.runs.outputs(asked.inputs, site)
        for layer in range(LAYERS):
            found[:, s, layer] = read(one.runs.restored(corrupt, kept, site, window(layer), units))
    (p, gap), (q, least) = read(clean), read(fallen)
    return PlainTrace(target, units, float(p), float(q), float(gap - least), found[0], found[1] - least)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_traces(kind: str, family: str, traced: Callable[[str], Traced]) -> None:
    one = traced(family)
    corrupted, options, _ = CORRUPTIONS[kind]
    trace = TraceConfig(sites=SITES, image_units=IMAGE_UNITS, **options)
    found = one.trace(parts=("trace",), corruption=kind, trace=trace)
    maps = {(row["id"], row["site"]): row for row in found.study.maps}
    means: dict[str, list[Any]] = {name: [] for name in ("trace", "trace_logit", "trace_effect", "trace_restored")}
    falls = []
    for number, asked in enumerate(one.asked):
        corrupt = corrupted(one, number)
        if corrupt is None:
            assert (asked.id, "mlp") not in maps
            continue
        plain = trace_by_hooks(one, number, kind, corrupt)
        for s, site in enumerate(SITES):
            check_map(maps[asked.id, site], asked, plain, s)
        by_class = classes_of(asked, plain.units)
        falls.append(plain.p - plain.q)
        means["trace_effect"].append(by_class(plain.restored - plain.q))
        means["trace_restored"].append(by_class(plain.restored))
        if plain.is_valid:
            means["trace"].append(by_class((plain.restored - plain.q) / (plain.p - plain.q)))
            means["trace_logit"].append(by_class(plain.gained / plain.drop))
    assert len(means["trace"]) >= 2, "a corruption that changes nothing shows nothing"
    for measure, values in means.items():
        for s, site in enumerate(SITES):
            for name in CLASSES:
                own = [each[name][s] for each in values if name in each]
                if own:
                    check(found, measure, f"{site}/{name}", one.mean(own), len(own), abs=2e-3)
                else:
                    assert not found.profile(measure, f"{site}/{name}")
    ratios = check_ratios(found, one, means["trace_effect"], falls)
    assert ratios or family == "llava", "a mean fall that is never clear of 0 shows nothing"
    assert {row.measure for row in found.rows} == {*means, "trace_ratio"}


def check_ratios(found: Any, one: Traced, effects: list[Any], falls: list[float]) -> int:
    """Compare ``trace_ratio``, mean effect over mean fall where that is clear of 0; returns the number compared."""
    defined = 0
    for name in CLASSES:
        kept = [i for i, each in enumerate(effects) if name in each]
        for s, site in enumerate(SITES):
            rows = found.profile("trace_ratio", f"{site}/{name}")
            assert sorted(rows) == (list(range(LAYERS)) if kept else [])
            if not kept:
                continue
            share = np.array(one.mean([effects[i][name][s] for i in kept])) / np.mean([falls[i] for i in kept])
            told = [(rows[layer].value, value) for layer, value in enumerate(share) if rows[layer].value is not None]
            assert all("not clear of 0" in row.undefined for row in rows.values() if row.value is None)
            assert [x for x, _ in told] == pytest.approx([x for _, x in told], abs=2e-3), (site, name)
            defined += len(told)
    return defined


def check_map(told: dict[str, Any], asked: PlainQuestion, plain: PlainTrace, s: int) -> None:
    """Compare an entry of ``traces.json``: the effect of each unit, over the fall where that is large enough."""
    assert told["measure"] == ("nie" if plain.is_valid else "ie")
    assert told["positions"] == [unit[0] for unit in plain.units]
    assert told["sizes"] == [len(unit) for unit in plain.units]
    assert told["classes"] == [asked.classes[unit[-1]] for unit in plain.units]
    assert told["target"] == asked.plain.processor.tokenizer.decode([plain.target])
    assert (told["p_clean"], told["p_corrupt"]) == (pytest.approx(plain.p, abs=1e-4), pytest.approx(plain.q, abs=1e-4))
    scale = plain.p - plain.q if plain.is_valid else 1.0
    np.testing.assert_allclose(told["values"], (plain.restored[s] - plain.q) / scale, atol=5e-4 / scale)


def classes_of(asked: PlainQuestion, units: Sequence[Sequence[int]]) -> Callable[[Any], dict[str, Any]]:
    """(S, N, U) -> by token class the (S, N) mean over its units."""
    names = np.array([asked.classes[unit[-1]] for unit in units])
    return lambda values: {name: values[..., names == name].mean(-1) for name in set(names.tolist())}
