"""Decisions belong to the run that they were made in, each run has all of its own."""

import logging
import os

import pytest

from lightning_mm.core.decisions import DecisionLog, decision_log, log_decision
from lightning_mm.core.errors import UserError


def names(log: DecisionLog) -> list[str]:
    return [decision.name for decision in log]


def test_two_runs_in_one_process_have_complete_logs(caplog: pytest.LogCaptureFixture) -> None:
    """What the first run decided is decided, kept and printed again by the second."""
    caplog.set_level(logging.INFO, "lightning_mm")
    logs = []
    for _ in range(2):
        with DecisionLog().opened() as log:
            for _ in range(3):
                log_decision("dtype", "float32", "small updates")
            log_decision("packing", "on", "no padding")
        logs.append(log)
    assert [names(log) for log in logs] == [["dtype", "packing"]] * 2
    assert [record.message for record in caplog.records].count("dtype: float32 (small updates)") == 2


def test_what_is_decided_before_a_run_belongs_to_the_next_one() -> None:
    decision_log().clear()
    log_decision("early", "1", "while the parts were made")
    first, second = DecisionLog(), DecisionLog()
    for log in (first, second):
        with log.opened():
            log.take_pending()
            log_decision("own", "1", "in the run")
    assert names(first) == ["early", "own"]
    assert names(second) == ["own"]
    assert not names(decision_log())


def test_a_run_that_fails_closes_its_log() -> None:
    decision_log().clear()
    with pytest.raises(ValueError, match="stop"), DecisionLog().opened():
        raise ValueError("stop")
    log_decision("later", "1", "outside")
    assert names(decision_log()) == ["later"]
    decision_log().clear()


def test_a_name_in_another_encoding_can_be_printed() -> None:
    name = os.fsdecode(b"t\xff \xc3\xa4.json")
    assert str(log_decision(name, name, "read")).encode() == r"t\udcff ä.json: t\udcff ä.json (read)".encode()
    assert str(UserError(f"No {name}.", "It is gone.", "Look.")).encode().startswith(r"No t\udcff ä.json.".encode())
