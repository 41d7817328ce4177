"""The vocabulary of layer measures: every measure of the analyses has words, and unknown ones are no fault."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mm.core.measure_catalog import QUESTIONS, measure

PROBES = ["entailment/random", "entailment/hard", "objects", "object_at_patches", "position", "count"]
# fmt: off
OTHERS = [
    "global_minus_local", "id_twonn", "id_gride", "participation_ratio", "effective_rank", "rankme", "alpha_req",
    "entropy", "anisotropy", "uniformity", "label_overlap", "block_influence", "angular_distance", "overlap", "cka",
    "cka_rbf", "cka_biased", "svcca", "pwcca", "procrustes", "rsa", "imbalance_image_to_text",
    "imbalance_text_to_image", "alignment", "gap", "gap_auc", "frechet", "mmd", "matched_cosine", "token_cosine",
    "flow", "knockout", "knockout_accuracy", "knockout_kl", "transplant", "ablation", "trace", "trace_effect",
    "trace_restored", "trace_ratio", "entropy_unit_rows", "distance_correlation",
    "drift_overlap", "drift_cka", "drift_procrustes", "drift_cosine", "drift_id", "score",
]
# fmt: on


@pytest.mark.parametrize("name", [*PROBES, *OTHERS])
def test_every_measure_has_words(name):
    known = measure(name)
    assert known.name == name
    assert known.title
    assert known.meaning
    assert known.unit
    assert known.question != "other"


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize(
    ("variant", "bounds"), [("text_only", (0, 1)), ("selectivity", (-1, 1)), ("compression", (0, None))]
)
def test_variants_of_a_probe_are_known_by_its_name(name, variant, bounds):
    known = measure(f"{name}/{variant}")
    assert known.name == f"{name}/{variant}"
    assert known.title.startswith(measure(name).title + ", ")
    assert known.question == measure(name).question
    assert (known.low, known.high) == bounds
    assert not known.main


def test_titles_tell_measures_apart():
    titles = [measure(name).title for name in [*PROBES, *OTHERS]]
    assert len(set(titles)) == len(titles)


def test_the_main_measures_are_the_contracts_and_few():
    main = {name for name in [*PROBES, *OTHERS] if measure(name).main}
    wanted = {"entailment/random", "entailment/hard", "objects", "overlap", "cka", "id_gride", "drift_overlap"}
    assert main == wanted | {"gap", "gap_auc"} | {"flow", "knockout", "ablation", "transplant"}


def test_what_is_lost_or_apart_is_looked_for_at_its_lowest():
    for name in [*PROBES, *OTHERS]:
        lowest = name.startswith(("gap", "imbalance", "drift_")) or name in ("alignment", "frechet", "mmd")
        lowest |= name in ("knockout", "knockout_accuracy", "ablation")
        assert (measure(name).seek == "min") == (lowest and name != "drift_id"), name


def test_what_causes_is_compared_with_no_effect_and_what_is_read_with_chance():
    assert {measure(name).null_word for name in PROBES} == {"chance"}
    causal = [name for name in OTHERS if measure(name).question == "causal"]
    assert {measure(name).null_word for name in causal} == {"no effect"}
    assert len(causal) == 10


@given(st.text(min_size=1))
def test_an_unknown_measure_keeps_its_name(name):
    known = measure("?" + name)
    assert known.name == "?" + name
    assert known.question in QUESTIONS
    assert not known.main
