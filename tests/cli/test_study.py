"""The verb study from the command line: its files, its folder, its report, and mistakes."""

from pathlib import Path

import pytest
import yaml

from lightning_mm.__main__ import main
from lightning_mm.cli.study import _files, _names
from tests.helpers.study import plant_study


def test_files_are_told_from_options() -> None:
    given = ["-c", "a.yaml", "--out", "x", "--config=b.yaml", "--seeds", "0,1"]
    assert _files(given) == (["a.yaml", "b.yaml"], ["--out", "x", "--seeds", "0,1"])
    assert _names("middle, [full]") == ["middle", "full"]
    assert _names(None) is None


def test_the_report_is_written_anew_from_small_files(tmp_path: Path) -> None:
    plant_study(tmp_path / "study", {"middle": 0.6}, pictures=60)
    assert main(["study", "--out", str(tmp_path / "study"), "--report_only", "true"]) == 0
    assert "Is middle better than connector alone?" in (tmp_path / "study/study.md").read_text()
    assert (tmp_path / "study/study.html").is_file()


def test_a_complete_study_only_writes_its_report(tmp_path: Path) -> None:
    plant_study(tmp_path / "study", {}, pictures=60)
    assert main(["study", "--out", str(tmp_path / "study"), "--max_minutes", "1"]) == 0
    assert (tmp_path / "study/study.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "No study is named."),
        (["-c", "mine.yaml", "--out", "o", "--only", "late"], "The study has no arm late."),
        (["-c", "mine.yaml", "--out", "o", "--seeds", "4"], "The study has no seed 4."),
        (["-c", "mine.yaml", "--outt", "o"], "--outt is no option."),
        (["-c", "wrong.yaml"], "wrong.yaml cannot be read."),
        (["--out", "nowhere", "--report_only", "true"], "nowhere is no study."),
    ],
)
def test_mistakes_are_told_on_one_screen(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = {"model": "m", "stage2": {"steps": 1}, "tests": {"t": "t.json"}, "arms": {"full": {"tuning": "Full"}}}
    Path("mine.yaml").write_text(yaml.safe_dump(mine))
    Path("wrong.yaml").write_text(yaml.safe_dump({**mine, "steps": 4}))
    assert main(["study", *arguments]) == 2
    assert told in capsys.readouterr().err
