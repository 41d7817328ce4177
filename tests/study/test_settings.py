"""The file of a study: what it may say, and which changes a folder with results refuses."""

from pathlib import Path
from typing import Any

import pytest

from lightning_mm.cli.shipped_configs import shipped_folder
from lightning_mm.core.errors import UserError
from lightning_mm.study.folder import Job, StudyFolder, read_table, write_table
from lightning_mm.study.run import jobs_of
from lightning_mm.study.settings import Arm, read_settings

SMALL: dict[str, Any] = {"model": "m", "stage2": {"steps": 3}, "tests": {"t": "t.json"}, "seeds": [0, 1]}


def test_the_shipped_study_is_read() -> None:
    found = read_settings(shipped_folder() / "study/nano.yaml")
    assert list(found.arms)[:2] == ["connector", "middle"]
    assert found.arms["full"].lr == 1e-4
    assert found.stage1 is not None
    assert (found.stage1.steps, found.stage2.steps, found.seeds) == (400, 300, (0, 1, 2))
    assert read_settings(found.to_dict()) == found


def test_later_files_win_and_arms_are_added(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("stage2: {steps: 5}\narms: {mine: {tuning: Full, train_connector: false}}\n")
    found = read_settings(SMALL, tmp_path / "more.yaml")
    assert found.stage2.steps == 5
    assert found.arms == {"mine": Arm(tuning="Full", train_connector=False)}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tests": {}}, "no tests"),
        ({"arms": {"stage1": {"tuning": "Full"}}}, "'stage1' cannot name"),
        ({"arms": {"a b": {"tuning": "Full"}}}, "'a b' cannot name"),
        ({"seeds": [1, 1]}, r"seeds are \[1, 1\]"),
        ({"stage3": 1}, "cannot be read"),
    ],
)
def test_mistakes_are_named(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_settings({**SMALL, **changed})


def test_jobs_are_all_arms_of_the_first_seed_then_of_the_next() -> None:
    study = read_settings({**SMALL, "arms": {"a": {"tuning": "Full"}, "b": {"tuning": "ConnectorOnly"}}})
    assert [str(job) for job in jobs_of(study, None, None)] == [
        f"{arm}, seed {seed}" for seed in (0, 1) for arm in ("stage1", "a", "b")
    ]
    assert jobs_of(study, ["b"], [1]) == [Job("stage1", 1), Job("b", 1)]
    with pytest.raises(UserError, match="no arm c"):
        jobs_of(study, ["c"], None)
    with pytest.raises(UserError, match="no seed 7"):
        jobs_of(study, None, [7])


def test_a_folder_refuses_another_study_and_names_what_changed(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    folder.open(read_settings(SMALL))
    folder.open(read_settings(SMALL))
    with pytest.raises(UserError) as refused:
        folder.open(read_settings({**SMALL, "lr": 0.25}))
    assert "lr: 0.0005, now 0.25" in refused.value.why
    arms = read_settings(SMALL).to_dict()["arms"]
    with pytest.raises(UserError) as refused:
        folder.open(read_settings({**SMALL, "arms": {**arms, "full": {"tuning": "Full", "lr": 0.5}}}))
    assert "arms.full.lr: 0.0003, now 0.5" in refused.value.why
    more = {**SMALL, "seeds": [0, 1, 2], "arms": {**arms, "new": {"tuning": "Full"}}}
    folder.open(read_settings(more))
    folder.open(read_settings(more))


def test_tables_have_equal_bytes_and_come_back(tmp_path: Path) -> None:
    rows = [(0, "a, b"), (1, 'say "no"')]
    for name in ("one.gz", "two.gz"):
        write_table(tmp_path / name, ("number", "text"), rows)
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
    assert [(int(row["number"]), row["text"]) for row in read_table(tmp_path / "one.gz")] == rows
    (tmp_path / "cut.gz").write_bytes((tmp_path / "one.gz").read_bytes()[:-6])
    with pytest.raises(UserError, match=r"cut.gz cannot be read"):
        list(read_table(tmp_path / "cut.gz"))
