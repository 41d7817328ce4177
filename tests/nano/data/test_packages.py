"""Archives are fetched by the registries' own clients, checked, and missed with a reason.

Data flow: a cache folder of the test's own -> ``fetch``, ``archive``; clients are small programs on PATH.
"""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_mm.core.errors import UserError
from lightning_mm.nano.data import packages
from lightning_mm.nano.data.fetch import fetch, main
from lightning_mm.nano.data.packages import PACKAGES, archive, cache_folder

CONTENT = b"an archive"


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_archives: None) -> Path:
    """A program named npm that writes an archive and the arguments that it was given."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program = tmp_path / "npm"
    name = PACKAGES["noto"].file
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\nprintf "{CONTENT.decode()}" > {name}\n')
    program.chmod(0o755)
    return program


def test_an_archive_is_fetched_once_and_checked(npm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = replace(PACKAGES["noto"], sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(packages.PACKAGES, "noto", known)
    assert archive("noto") is None
    assert fetch(["noto"]) == ["noto"]
    assert (npm.parent / "said").read_text().split() == [
        "pack", "--ignore-scripts", "--loglevel=error", "@iconify-json/noto@1.2.9",
    ]  # fmt: skip
    npm.unlink()
    assert fetch(["noto"]) == ["noto"], "what is there is not fetched again"
    found = archive("noto")
    assert found is not None
    assert found.read_bytes() == CONTENT
    assert [path.name for path in cache_folder().iterdir()] == [known.file]


def test_another_archive_is_refused(npm: Path) -> None:
    with pytest.raises(UserError, match=r"noto-1\.2\.9\.tgz is not the archive"):
        fetch(["noto"])
    assert not list(cache_folder().iterdir())
    (cache_folder() / PACKAGES["noto"].file).write_bytes(CONTENT)
    with pytest.raises(UserError, match="is not the archive"):
        archive("noto")
    assert main([]) == 2


def test_what_cannot_be_fetched_is_said(npm: Path, caplog: pytest.LogCaptureFixture) -> None:
    npm.write_text("#!/bin/sh\necho no registry >&2\nexit 1\n")
    with caplog.at_level(logging.INFO, "lightning_mm"):
        assert fetch(["noto"]) == []
    assert "nano_pictures.noto: not there (npm failed: no registry)" in caplog.text


def test_a_machine_without_the_program_is_told(
    no_archives: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO, "lightning_mm"):
        assert fetch(["twemoji"]) == []
    assert "npm is not installed on this machine" in caplog.text
