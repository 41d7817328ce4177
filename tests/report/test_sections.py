"""The report's numbers against published ones, and its words against contents of any shape."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mm.report.html import write_report
from lightning_mm.report.sections import run


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(right, n, low, high):
    assert run.wilson(right / n, n) == pytest.approx((low, high), abs=5.1e-5)  # half of the last printed digit


@given(st.sets(st.integers(0, 40), max_size=6))
def test_ranges_name_each_number_once(numbers):
    said = run.ranges(sorted(numbers))
    found = set()
    for span in said.split(", ") if numbers else []:
        first, _, last = span.partition("–")
        found |= set(range(int(first), int(last or first) + 1))
    assert found == numbers


@pytest.mark.parametrize(
    ("after", "majority", "no_image", "verdict"),
    # the interval of 81 % of 263 begins at 75.8 %
    [
        (0.81, 0.7, 0.75, "above both"),
        (0.81, 0.7, 0.76, "not above no picture"),
        (0.81, 0.8, 0.9, "not above both"),
        (0.81, 0.7, None, "above majority"),
        (0.81, None, None, ""),
        (None, 0.5, 0.5, ""),
    ],
)
def test_a_gain_counts_only_where_the_interval_clears_each_baseline(after, majority, no_image, verdict):
    row = {"type": "a", "n": 263, "before": None, "after": after, "majority": majority, "no_image": no_image}
    (score,) = run.scores({"rows": [row]})
    assert score.verdict == verdict
    assert score.above == verdict.startswith("above")


@pytest.mark.parametrize("share", [-0.1, 1.1, "1", [0.5]])
def test_what_is_no_fraction_is_refused(share):
    with pytest.raises(ValueError, match="no fraction"):
        run.scores({"rows": [{"type": "a", "n": 1, "after": share}]})


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ({"model": {"backbone": "nano/a"}}, "nano/a"),
        ({"model": {"backbone": {"path": "nano/b"}}}, "nano/b"),
        ({"model": {"backbone": {"class_path": "P", "init_args": {"path": "nano/c"}}}}, "nano/c"),
        ({"model": {"backbone": {"class_path": "P"}}}, ""),
        ({}, ""),
    ],
)
def test_the_model_is_found_where_the_configuration_names_it(config, model):
    assert run.model_of(config) == model


def test_what_is_left_out_is_told_by_category_with_one_example():
    rows = [{"kind": "cut", "reason": f"missing image: {i}.png", "origin": f"a:{i}"} for i in range(3)]
    rows += [{"kind": "dropped", "reason": f"reason {i}", "origin": "b:1"} for i in range(60)]
    told = run.ledger(rows)
    assert told[0] == {"kind": "cut", "reason": "missing image", "count": "3", "example": "a:0: 0.png"}
    assert told[1] == {"kind": "dropped", "reason": "reason 0", "count": "1", "example": "b:1"}
    assert len(told) == 51
    assert told[-1] == {"kind": "", "reason": "11 more reasons", "count": "11", "example": ""}
    (long,) = run.ledger([{**rows[0], "reason": "x: " * 900}])
    assert max(map(len, long.values())) == 160


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)  # one example writes a whole report: some 10 ms, more on a busy machine
@given(st.data())
def test_no_content_crashes_the_report(tmp_path_factory, data):
    """Real shapes with one part replaced by anything at all."""
    folder = tmp_path_factory.mktemp("run")
    row = {"type": "a", "n": 3, "before": 0.1, "after": 0.5, "majority": None, "no_image": 0.2}
    layers = {"expression": "1", "trained": [1], "total": 3}
    part = {"region": "layers 1-1", "mode": "lora", "parameters": 5, "trainable": 5, "dtype": "f", "training": True}
    files = {
        "evaluation.json": {"split": "test", "rows": [row]},
        "census.json": {
            "policy": "p",
            "layers": layers,
            "rows": [part],
            "total_parameters": 9,
            "trainable_parameters": 5,
        },
        "samples.json": [{"images": [], "question": "q", "truth": "t", "before": "x", "correct_before": True}],
        "decisions.json": [{"name": "a", "value": "b", "reason": "c"}],
    }
    for name, content in files.items():
        holder = data.draw(st.sampled_from([content, *_containers(content)]))
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if keys:
            holder[data.draw(st.sampled_from(keys))] = data.draw(anything)
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.csv").write_text("step,train/loss\n1,1e308\n2,-1e308\n3,x\ninf,2\n4,nan\n")
    (folder / "config.yaml").write_text(data.draw(st.sampled_from(["a: [", "{[]: 1}", "model: 3", "!!x {a: b}"])))
    assert write_report(folder).stat().st_size > 10_000
    shutil.rmtree(folder)


def _containers(content):
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [found for item in inner if isinstance(item, dict | list) for found in [item, *_containers(item)]]
