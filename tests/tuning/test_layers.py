"""Layer ranges: the grammar, its errors, and what holds for every spec."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mm.core.errors import UserError
from lightning_mm.tuning.layers import count_layers, describe_layers, resolve_layers


@pytest.mark.parametrize(
    ("spec", "n", "expected"),
    [
        ("6-16", 32, list(range(6, 17))),
        ("25%-50%", 32, list(range(8, 16))),
        ("25%-50%", 30, list(range(7, 15))),
        ("0%-100%", 5, [0, 1, 2, 3, 4]),
        ("all", 3, [0, 1, 2]),
        ("last:8", 30, list(range(22, 30))),
        ("first:25%", 30, list(range(8))),
        ("middle:4", 10, [3, 4, 5, 6]),
        ("uniform:25%", 32, [2, 6, 10, 14, 18, 22, 26, 30]),
        ([3, 7, 11], 12, [3, 7, 11]),
        (5, 12, [5]),
        ("11,3-4", 12, [3, 4, 11]),
    ],
)
def test_specs(spec: object, n: int, expected: list[int]) -> None:
    assert resolve_layers(spec, n) == tuple(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("6-40", "0 to 31"),
        ("9-3", "above"),
        ("50%-25%", "rise"),
        ("six", "not a layer range"),
        ("", "not a layer range"),
        ([], "no layer"),
        ("0", None),
        ("last:0", "asks for 0"),
        ("last:33", "asks for 33"),
        ("10%-10.5%", "no layer"),
        (-1, "not a layer range"),
    ],
)
def test_errors_name_the_cause(spec: object, said: str | None) -> None:
    if said is None:
        assert resolve_layers(spec, 32) == (0,)  # type: ignore[arg-type]
        return
    with pytest.raises(UserError) as caught:
        resolve_layers(spec, 32)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert "uniform:25%" in caught.value.fix


@given(n=st.integers(1, 100), count=st.integers(1, 100), seed=st.integers(0, 9))
def test_counted_patterns_give_exactly_the_count(n: int, count: int, seed: int) -> None:
    count = min(count, n)
    for spec in (f"first:{count}", f"last:{count}", f"middle:{count}", f"uniform:{count}", f"random:{count}:{seed}"):
        layers = resolve_layers(spec, n)
        assert len(layers) == len(set(layers)) == count == count_layers(spec, n)
        assert list(layers) == sorted(layers)
        assert 0 <= layers[0] <= layers[-1] < n


@given(n=st.integers(1, 100), cut=st.integers(1, 99))
def test_two_shares_partition_the_depth(n: int, cut: int) -> None:
    both: list[int] = []
    for spec in (f"0%-{cut}%", f"{cut}%-100%"):
        try:
            both += resolve_layers(spec, n)
        except UserError:  # a share so thin that it holds no layer's middle
            continue
    assert sorted(both) == list(range(n))


@given(st.sets(st.integers(0, 60), min_size=1))
def test_a_description_reads_back(indices: set[int]) -> None:
    assert resolve_layers(describe_layers(sorted(indices)).replace(" ", ""), 61) == tuple(sorted(indices))


def test_a_seed_draws_the_same_layers() -> None:
    assert resolve_layers("random:8:3", 32) == resolve_layers("random:8:3", 32) != resolve_layers("random:8:4", 32)
