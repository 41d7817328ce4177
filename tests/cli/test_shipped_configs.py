"""Shipped config files are found from any folder, and a file of the user comes first."""

import os
from pathlib import Path

import pytest

from lightning_mm.__main__ import main
from lightning_mm.cli.shipped_configs import find_configs, shipped_folder, shipped_names
from lightning_mm.core.errors import UserError
from lightning_mm.study.settings import read_settings
from tests.helpers.cli import ROOT


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_all_files_of_the_repository_are_found() -> None:
    files = sorted(str(file.relative_to(ROOT / "configs")) for file in (ROOT / "configs").rglob("*.yaml"))
    assert len(files) > 15
    assert shipped_names() == files


@pytest.mark.parametrize(
    "given",
    [
        ["-c", "trainer/gpu.yaml"],
        ["--config", "trainer/gpu"],
        ["-c", "configs/trainer/gpu.yaml"],
        ["--config=trainer/gpu.yaml"],
        ["-c=./configs/trainer/gpu.yaml"],
    ],
)
def test_shipped_file_from_any_folder(given: list[str]) -> None:
    (path,) = [value.rpartition("=")[2] for value in find_configs(["fit", *given])[-1:]]
    assert os.path.samefile(path, ROOT / "configs/trainer/gpu.yaml")


def test_own_file_comes_first() -> None:
    Path("trainer").mkdir()
    Path("trainer/gpu.yaml").write_text("trainer: {max_steps: 1}")
    assert find_configs(["fit", "-c", "trainer/gpu.yaml"]) == ["fit", "-c", "trainer/gpu.yaml"]


def test_yaml_text_is_no_name() -> None:
    given = ["fit", "-c", "{trainer: {max_steps: 1}}"]
    assert find_configs(given) == given


def test_misspelled_name() -> None:
    with pytest.raises(UserError, match=r"Did you mean trainer/gpu\.yaml\?"):
        find_configs(["fit", "-c", "trainer/gpuu.yaml"])
    with pytest.raises(UserError, match=r"Shipped files: callbacks/causal\.yaml"):
        find_configs(["fit", "-c", "qqqqqqq"])


def test_every_shipped_file_parses(capsys: pytest.CaptureFixture[str]) -> None:
    """The command line itself finds them, together with a model; those of studies are no options of a fit."""
    studies = [name for name in shipped_names() if name.startswith("study/")]
    assert all(read_settings(shipped_folder() / name).arms for name in studies)
    fits = sorted(set(shipped_names()) - set(studies), key=lambda name: (not name.startswith("models/"), name))
    files = [part for name in fits for part in ("-c", name)]  # recipes first: each names another model
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *files, "--print_config"])
    assert stopped.value.code == 0
    assert "nano/model" in capsys.readouterr().out
    assert shipped_folder().is_dir()
