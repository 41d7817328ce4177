"""Traces equal the plain loop, are exact at their ends, and find an association where it was written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.causal.editing.multedit import EditConfig, ValueOptimizer, multedit
from lightning_mm.causal.editing.weight_edit import apply_edits
from lightning_mm.causal.effects.activation_patching import CausalTrace, TraceConfig, attribution_scores, causal_trace
from lightning_mm.causal.effects.aggregate import average_traces, averages_table
from lightning_mm.causal.interventions.activation_cache import cache_activations
from lightning_mm.causal.interventions.corruption import CorruptedQuestion, corrupt_question
from lightning_mm.causal.interventions.interventions import Intervention
from lightning_mm.causal.questions.question import EncodedQuestion, last_logits
from lightning_mm.core.errors import UserError
from tests.helpers.causal_models import FAMILIES, Subject, subject
from tests.helpers.taught_models import EDITED, Taught

SITES = ("mlp", "attention", "residual")


def corrupt_of(
    one: Subject, encoded: EncodedQuestion, kind: Any = "token", others: tuple[EncodedQuestion, ...] = ()
) -> CorruptedQuestion:
    made = corrupt_question(encoded, kind, (encoded, *others), one.processing, one.mm)
    assert isinstance(made, CorruptedQuestion), made
    return made


def traced(one: Subject, encoded: EncodedQuestion, corrupt: CorruptedQuestion, **config: Any) -> CausalTrace:
    return causal_trace(one.mm, encoded, corrupt, TraceConfig(sites=SITES, **config))


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_plain_loop(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()
    corrupt = corrupt_of(one, encoded)
    fast, plain = (traced(one, encoded, corrupt, width=2, plain=plain) for plain in (False, True))
    # Sums of the same float32 products in another order.
    torch.testing.assert_close(fast.restored, plain.restored, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(fast.logit_difference, plain.logit_difference, atol=1e-5, rtol=1e-5)
    assert fast.effect.abs().max() > 1e-6, "what brings nothing back shows nothing"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "internvl", "gemma3", "mllama"])
@pytest.mark.parametrize("kind", ["image", "gaussian"])
def test_other_corruptions_equal_the_plain_loop(
    name: str, kind: str, family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()
    corrupt = corrupt_of(one, encoded, kind, (one.encode(seed=1),))
    config: dict[str, Any] = {"image_units": 2, "shortlist": 10}
    fast, plain = (traced(one, encoded, corrupt, plain=plain, **config) for plain in (False, True))
    torch.testing.assert_close(fast.restored, plain.restored, atol=1e-6, rtol=1e-5, equal_nan=True)
    assert int(fast.restored.isfinite().sum()) == 10 * len(SITES)


@pytest.mark.parametrize("name", FAMILIES)
def test_last_residual_of_the_last_token_brings_everything_back(
    name: str, family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()
    found = traced(one, encoded, corrupt_of(one, encoded))
    assert found.restored[2, -1, -1] == pytest.approx(found.p_clean, rel=1e-5)
    before = found.restored[2, -1, :-1]
    torch.testing.assert_close(before, torch.full_like(before, found.p_corrupt), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_attribution_is_the_slope_of_the_effect(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()
    corrupt = corrupt_of(one, encoded)
    clean = cache_activations(one.mm, encoded.inputs, sites=SITES)
    target, rival = (int(x) for x in clean.logits[0].topk(2).indices)
    units = [torch.tensor([position]) for position in encoded.constraint.tolist()]
    guess = attribution_scores(one.mm, corrupt, clean, "mlp", units, target, rival)
    base = cache_activations(one.mm, corrupt.inputs, sites=SITES)
    layer, unit, step = 1, units[0], 1e-2
    way = clean.values["mlp", layer] - base.values["mlp", layer]

    def difference(share: float) -> float:
        def moved(change: Any) -> torch.Tensor:
            return change.output + share * way[:, unit]

        change = Intervention("move", "mlp", (layer,), unit, moved)
        logits = cache_activations(one.mm, corrupt.inputs, [change]).logits
        return float(logits[0, target].double() - logits[0, rival].double())

    slope = (difference(step) - difference(-step)) / (2 * step)
    # float32 differences over a step of a hundredth.
    assert float(guess[layer, 0]) == pytest.approx(slope, abs=2e-4, rel=0.02)


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_finds_an_association_where_it_was_written(name: str, known: Callable[[str], Taught]) -> None:
    one = known(name)
    behind, kept = one.forced("b", "i"), one.forced("c", "e")
    knowledge = multedit([ValueOptimizer(one.mm, each) for each in (behind, kept)], EDITED, EditConfig())
    encoded, other = (one.encoder.encode(one.question(word)) for word in ("b", "c"))
    target = int(behind.ids[0])
    assert isinstance(encoded, EncodedQuestion)
    assert isinstance(other, EncodedQuestion)
    with apply_edits(one.model, [knowledge]):
        assert int(last_logits(one.mm, encoded.inputs).argmax()) == target
        corrupt = CorruptedQuestion(encoded, "symmetric", other.inputs, encoded.constraint)
        found = causal_trace(one.mm, encoded, corrupt, TraceConfig(sites=("mlp", "attention")), target)
    assert found.is_valid
    mlp = found.normalized_effect[0]
    layer, unit = divmod(int(mlp.argmax()), mlp.shape[1])
    assert (layer, int(found.units[unit][0])) == (EDITED, int(encoded.constraint[-1]))
    assert float(mlp.max()) > 0.8
    # At the last token it must arrive, too; anywhere else nothing else brings it back.
    before = found.normalized_effect[..., :-1].clone()
    before[0, layer, unit] = 0
    assert float(before.max()) < 0.5


def test_averages_count_questions_once_and_tell_what_is_left_out(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    found = [traced(one, one.encode(seed=seed), corrupt_of(one, one.encode(seed=seed))) for seed in range(4)]
    known = [_with(each, p_clean=0.9, p_corrupt=0.1) for each in found[:3]]
    blind = _with(found[3], p_clean=0.5, p_corrupt=0.49)
    rows = {(m, site): row for m, site, row in average_traces([*known, blind])}
    inside = [i for i, name in enumerate(known[0].classes) if name == "constraint"]
    expected = torch.stack([(each.restored[0, 1, inside].mean() - 0.1) / 0.8 for each in known]).mean()
    row = rows["trace", "mlp/constraint"][1]
    assert row.value == pytest.approx(float(expected), abs=1e-9)
    assert (row.n, row.null) == (3, 0.0)
    assert row.notes == ("1 of 4 questions left out: the corruption hardly changed the answer",)
    restored = torch.stack([each.restored[0, 1, inside].mean() for each in (*known, blind)])
    effect, level = rows["trace_effect", "mlp/constraint"][1], rows["trace_restored", "mlp/constraint"][1]
    fallen = torch.tensor([0.1, 0.1, 0.1, 0.49], dtype=torch.float64)
    assert effect.value == pytest.approx(float((restored - fallen).mean()), abs=1e-9)
    assert level.value == pytest.approx(float(restored.mean()), abs=1e-9)
    assert (effect.n, effect.null, level.null) == (4, 0.0, pytest.approx(float(fallen.mean())))
    levels = "of all traced questions the mean probability is 0.800 clean, 0.198 corrupted"
    assert effect.notes == (f"{levels}; 1 of 4 fall by less than 0.05, and count",)
    ratio = rows["trace_ratio", "mlp/constraint"][1]
    assert ratio.undefined.startswith("mean fall 0.603 is not clear of 0"), "three large falls and a small one"
    assert (ratio.n, ratio.notes) == (4, effect.notes)
    alone = {(m, site): row for m, site, row in average_traces(known)}["trace_ratio", "mlp/constraint"][1]
    assert alone.value == pytest.approx(float((restored - fallen)[:3].mean()) / 0.8, abs=1e-9)
    table = averages_table([*known, blind], asked=9, right=5)
    counts = {row[1]: tuple(row[3:]) for row in table["rows"]}
    every = dict.fromkeys(("trace_effect", "trace_restored", "trace_ratio"), (4, 1))
    assert counts == every | dict.fromkeys(("trace", "trace_logit"), (3, 0))
    assert "9 questions asked, 5 answered right, 4 of these traced; 1 of them" in table["note"]


def test_a_corruption_that_changes_nothing_is_an_error(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    encoded = one.encode()
    same = CorruptedQuestion(encoded, "token", encoded.inputs, encoded.constraint)
    with pytest.raises(UserError, match="changes nothing"):
        traced(one, encoded, same)
    with pytest.raises(UserError, match="nothing to trace"):
        TraceConfig(width=0)


def _with(found: CausalTrace, **fields: float) -> CausalTrace:
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    return CausalTrace(**{**values, **fields})
