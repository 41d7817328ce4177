"""Simulated designs of every statistic that is shown with an interval, a band of chance, a p-value or a verdict."""

from calibration_cases.case import Case


def all_cases() -> dict[str, Case]:
    """Every case by its name."""
    from calibration_cases import auto_layers, causal, geometry, peaks, probing, study

    rooms = (probing, geometry, peaks, auto_layers, study, causal)
    return {case.name: case for room in rooms for case in room.cases()}
