"""Intervals cover and verdicts are right within what so few models can tell; and the arithmetic of the simulation.

A small part of ``scripts/calibration.py``: fewer models, the cheap designs, fixed seeds. What fails is worse than 93 %
covered or 5 % found by more than so few models can be by chance: with new seeds one in 1,000 right statistics would.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from calibration_cases import all_cases, records  # noqa: E402
from calibration_cases.case import Case, Outcome, Reading  # noqa: E402
from calibration_cases.records import Record, simulate  # noqa: E402
from calibration_cases.table import faults, tables  # noqa: E402
from calibration_cases.tally import share, tally  # noqa: E402


def departures(entry: dict[str, Any]) -> list[str]:
    """Statistics that cover too little, or find too much where there is nothing, beyond chance."""
    return faults({entry["about"]: entry})


def simulated(name: str, models: int, folder: Path) -> dict[str, Any]:
    case = all_cases()[name]
    return tally(case, simulate(case, range(models), folder))


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("study/96/1 seeds/null", 300),
        ("study/96/3 seeds/null", 300),
        ("curves/31/smooth/null", 100),
        ("causal means/40/alone/null", 60),
        ("causal means/40/groups/planted", 60),
    ],
)
def test_means_and_differences_hold_their_level(name: str, models: int, tmp_path: Path) -> None:
    assert departures(simulated(name, models, tmp_path)) == []


@pytest.mark.parametrize("name", ["geometry/96/alone/null", "geometry/96/groups/null", "one cloud/96/noise/null"])
def test_measures_of_geometry_hold_their_level(name: str, tmp_path: Path) -> None:
    assert departures(simulated(name, 30, tmp_path)) == []


@pytest.mark.parametrize("name", ["entailment/96/pictures 50%/null"])
def test_probes_and_their_peaks_hold_their_level(name: str, tmp_path: Path) -> None:
    assert departures(simulated(name, 30, tmp_path)) == []


def outcomes(readings: Sequence[Reading], profile: Sequence[float] = ()) -> list[Record]:
    return [
        Record(seed, Outcome([reading], {"p": [value]} if profile else {}), 0.5)
        for seed, (reading, value) in enumerate(zip(readings, profile or [0.0] * len(readings), strict=True))
    ]


def a_case(kind: str, draw: Any = lambda seed: seed, measure: Any = None) -> Case:
    return Case(f"a/b/c/{kind}", "made up", draw, measure, ("core/estimate.py",))


def test_shares_are_counted_and_have_exact_intervals() -> None:
    """Three of four cover 2.0; one of four lies outside of its band; Clopper-Pearson by the beta distribution."""
    ends = [(1.0, 3.0), (0.0, 2.0), (2.5, 3.0), (2.0, 2.0)]
    readings = [
        Reading("x", 1.0 + number, low, high, 0.0, 0.0, 3.0, truth=2.0, found=number == 0)
        for number, (low, high) in enumerate(ends)
    ]
    told = tally(a_case("null"), outcomes(readings))["statistics"]["x"]
    assert (told["mean"], told["null_told"]) == (2.5, 0.0)
    assert told["coverage"] == [0.75, 0.1941, 0.9937, 4]
    assert told["outside"][0] == 0.25
    assert told["size"][0] == 0.25
    planted = tally(a_case("planted"), outcomes(readings))["statistics"]["x"]
    assert planted["power"] == told["size"]
    assert "outside" not in planted
    assert share([True] * 10)[1:3] == [pytest.approx(0.6915, abs=1e-4), 1.0]


def test_the_truth_is_the_mean_of_all_models_or_of_a_layer_chosen_by_each() -> None:
    by_mean = [Reading("x", value, value - 0.6, value + 0.6) for value in (0.0, 1.0, 2.0, 1.0)]
    assert tally(a_case("null"), outcomes(by_mean))["statistics"]["x"]["coverage"][0] == 0.5
    by_layer = [Reading("x", 9.0, 0.9, 1.1, profile="p", layer=0)] * 2
    assert tally(a_case("null"), outcomes(by_layer, [0.5, 1.5]))["statistics"]["x"]["coverage"][0] == 1.0


def test_a_stopped_run_goes_on_and_other_code_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def measure(seed: int) -> Outcome:
        asked.append(seed)
        return Outcome([Reading("x", seed / 7, found=True)], {"p": [None, 1.0]})

    case = a_case("null", measure=measure)
    first = simulate(case, range(3), tmp_path)
    path = records.path_of(tmp_path, case)
    path.write_text(path.read_text() + '{"key": "cut o')
    assert simulate(case, range(4), tmp_path)[:3] == [
        Record(each.seed, each.outcome, pytest.approx(each.seconds, abs=1e-3)) for each in first
    ]
    assert asked == [0, 1, 2, 3]
    monkeypatch.setattr(records, "code_digest", lambda rests_on: "other")
    simulate(case, range(2), tmp_path)
    assert asked[4:] == [0, 1]


def test_comments_and_docstrings_do_not_count_as_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PACKAGE", tmp_path)
    file, digests = tmp_path / "one.py", []
    for text in ('"""A."""\nx = 1\n', '"""B."""\n# why\nx = 1\n', '"""B."""\nx = 2\n'):
        file.write_text(text)
        records.code_digest.cache_clear()
        digests.append(records.code_digest(("one.py",)))
    records.code_digest.cache_clear()
    assert digests[0] == digests[1] != digests[2]


def test_the_table_shows_what_is_off_and_every_case_is_named_in_four_parts() -> None:
    statistic = {"coverage": [0.8, 0.7, 0.9, 60], "size": [0.04, 0.01, 0.1, 60]}
    cases = {"a/9/c/null": {"about": "made up", "models": 60, "statistics": {"x": statistic}}}
    assert "| x | c | **80** | – | – | 4 | – |" in tables(cases)
    assert faults(cases) == ["a/9/c/null: x covers in 80.0% (70.0% to 90.0%)"]
    # 19 of 20 intervals miss no more than 93 % allow, 300 of 300 are too wide, and 12 of 60 are found too often.
    for entry, cell in (
        ({"coverage": [0.95, 0.75, 1.0, 20]}, "| 95 |"),
        ({"coverage": [1.0, 0.98, 1.0, 300]}, "| *100* |"),
        ({"size": [0.2, 0.1, 0.3, 60]}, "| **20** |"),
        ({"outside": [0.1, 0.03, 0.2, 60]}, "| 10 |"),
    ):
        assert cell in tables({"a/9/c/null": {"about": "made up", "models": 60, "statistics": {"x": entry}}})
    known = all_cases()
    assert all(len(name.split("/")) == 4 and name.endswith(("/null", "/planted")) for name in known)
    for case in known.values():
        assert records.key_of(case)
        assert all((records.PACKAGE / name).exists() for name in case.rests_on)
    assert json.dumps(share([True]))
