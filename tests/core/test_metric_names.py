"""The vocabulary: every rank declares the same keys, and every declared key is found again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mm.core import metric_names

kinds = st.lists(st.text(min_size=1, max_size=12), max_size=6)


@given(kinds, kinds, st.randoms(use_true_random=False))
def test_declared_keys_do_not_depend_on_the_order_a_rank_meets_types_in(types, groups, random):
    shuffled = types + types[:1]
    random.shuffle(shuffled)
    assert list(metric_names.declare(types, groups)) == list(metric_names.declare(shuffled, reversed(groups)))


@given(kinds, kinds)
def test_every_declared_metric_is_looked_up_as_itself(types, groups):
    for key, metric in metric_names.declare(types, groups).items():
        assert metric.name == key
        assert metric_names.lookup(key) == metric


def test_the_contracts_keys_are_declared():
    declared = set(metric_names.declare(["colour"], ["layers"]))
    assert declared >= {
        "train/loss",
        "train/grad_norm",
        "train/supervised_tokens_per_second",
        "train/samples_per_second",
        "train/lr/layers",
        "val/loss",
        "val/token_accuracy",
        "val/exact_match",
        "val/exact_match/colour",
        "test/loss",
        "test/exact_match/colour",
        "test/no_image/colour",
        "test/majority/colour",
        "data/rejected",
    }
    assert metric_names.exact_match("val", "colour") in declared
    assert metric_names.no_image("colour") in declared
    assert metric_names.majority() in declared
    assert metric_names.learning_rate("layers") in declared


def test_a_best_value_stands_for_the_run_where_there_is_a_best():
    for metric in metric_names.declare([]).values():
        if metric.better is not None and metric.name.startswith(("val/", "test/")):
            assert metric.summary == metric.better


def test_foreign_keys_are_not_ours():
    assert metric_names.lookup("epoch") is None
    assert metric_names.lookup("train/loss_step") is None


PROFILES = [
    ("entailment/hard", "last"),
    ("global_minus_local", "last"),
    ("cka", "image~text"),
    ("objects/text_only", "last"),
    ("my_own", "object"),
]


def test_facts_of_profiles_are_declared_and_looked_up_as_themselves():
    declared = metric_names.declare([], [], PROFILES)
    assert list(declared) == list(metric_names.declare([], [], reversed(PROFILES)))
    for key in (
        "inside/entailment/hard/last/peak_layer",
        "inside/global_minus_local/last/peak",
        "inside/cka/image~text/in_trained_range",
    ):
        assert key in declared
    assert {metric_names.INSPECTION_SECONDS, metric_names.INSPECTION_SHARE} <= set(declared)
    for key, metric in declared.items():
        assert metric_names.lookup(key) == metric
        assert metric.name == key
        assert metric.meaning


def test_w_and_b_charts_only_the_peaks_of_main_measures():
    shown = [
        key for key, metric in metric_names.declare([], [], PROFILES).items() if "/last/" in key and not metric.hidden
    ]
    assert shown == ["inside/entailment/hard/last/peak_layer", "inside/entailment/hard/last/peak"]


@pytest.mark.parametrize(
    "key",
    [
        "inside/cka/peak",
        "inside/peak",
        "inside",
        "inside/cka/last/middle",
        "x/cka/last/peak",
        "inside/global_minus_local",
    ],
)
def test_keys_that_only_look_like_facts_of_profiles_are_not_ours(key):
    assert metric_names.lookup(key) is None


@pytest.mark.parametrize("site", ["", "a/b"])
def test_a_site_that_would_change_the_measure_is_our_fault(site):
    with pytest.raises(AssertionError):
        metric_names.layer_metric("cka", site, "peak")
