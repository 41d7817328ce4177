"""Tux Paint stamps as a further source: which become things, what is left out, and that they join the build.

Data flow: a folder of stamps made here -> ``load_stamps``, ``build_nano_data``.
"""

import json
from pathlib import Path

import pytest
from PIL import Image

from lightning_mm.core.errors import UserError
from lightning_mm.nano.data import Sizes, build_nano_data
from lightning_mm.nano.data.__main__ import main
from lightning_mm.nano.data.tuxpaint import DEFAULT_FOLDER, load_stamps
from tests.helpers.nano_rows import read_rows


def _stamp(folder: Path, place: str, caption: str | None, color: tuple[int, int, int, int]) -> None:
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (60, 40))
    picture.paste(color, (10, 5, 50, 35))
    picture.save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption + "\nde.utf8=Irgendwas\n", "utf-8")


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    folder = tmp_path / "stamps"
    _stamp(folder, "animals/mammals/ferret.png", "A ferret.", (150, 100, 60, 255))
    _stamp(folder, "animals/poodle.png", "A poodle.", (250, 250, 250, 255))
    _stamp(folder, "food/fruit/fig.png", "A green fig.", (60, 180, 60, 255))
    _stamp(folder, "food/many.png", "Some nuts on a big plate.", (1, 200, 3, 255))
    _stamp(folder, "symbols/arrow.png", "An arrow.", (1, 2, 3, 255))
    _stamp(folder, "plants/bare.png", None, (1, 2, 3, 255))
    _stamp(folder, "plants/clear.png", "A fern.", (1, 2, 3, 0))
    (folder / "plants" / "torn.png").write_bytes(b"not a picture")
    (folder / "plants" / "torn.txt").write_text("A moss.")
    return folder


def test_stamps_become_things_and_the_rest_is_counted(stamps: Path) -> None:
    things, rejected = load_stamps(stamps, 160)
    assert [(thing.name, thing.category, thing.group, thing.color) for thing in things] == [
        ("ferret", "animal", "ferret", "brown"),
        ("poodle", "animal", "dog", "white"),
        ("green fig", "food", "fig", "green"),
    ]
    assert [thing.cutout.size for thing in things] == [(40, 30)] * 3
    assert sorted(each.origin.rpartition("/")[2] for each in rejected) == [
        "arrow.png", "bare.png", "clear.png", "many.png", "torn.png",
    ]  # fmt: skip
    assert len({each.reason for each in rejected}) == 5


def test_a_folder_without_stamps_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No stamps"):
        load_stamps(tmp_path, 160)


def test_stamps_join_the_build(tmp_path: Path, stamps: Path, no_archives: None) -> None:
    for letter in "bcdefghjklmnpqrstvwxz":
        _stamp(stamps, f"plants/{letter}.png", f"A {letter}-fern.", (60, 180, 60, 255))
    sizes = Sizes(train=60, val={}, test={}, test_unseen={}, probes=0, countries=2)
    out = build_nano_data(tmp_path / "data", sizes=sizes, stamps=stamps)
    assert any("stamps" in row["source"] for row in read_rows(out, "train"))
    assert "Tux Paint" in (out / "LICENSE.txt").read_text("utf-8")
    left_out = json.loads((out / "manifest.json").read_text("utf-8"))["left_out"]
    assert sum(number for reason, number in left_out.items() if reason.startswith("a stamp")) == 5


@pytest.mark.skipif(DEFAULT_FOLDER.is_dir(), reason="stamps are installed on this machine")
def test_stamps_that_are_nowhere_are_an_error(
    tmp_path: Path, no_archives: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([str(tmp_path / "data"), "--stamps"]) == 2
    assert "scripts/nano_pictures.sh --stamps" in caplog.text
