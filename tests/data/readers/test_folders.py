"""A folder gives each option the files of its split, however the folder is named."""

import json
from pathlib import Path

import pytest

from lightning_mm.data.readers.locate import locate
from lightning_mm.data.readers.source_spec import Source


@pytest.mark.parametrize("written", ["data", "./data", "data/", "{}/data", "data/../data"])
@pytest.mark.parametrize("option", ["train", "validation", "test"])
def test_a_split_by_its_name(written: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train", "val", "test"):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps([{"question": name, "answer": name}]))
    monkeypatch.chdir(tmp_path)
    (file,) = locate(Source(written.format(tmp_path)), option).files
    assert file.stem == {"validation": "val"}.get(option, option)
