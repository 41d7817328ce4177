"""The key of a cached row tells apart all that changes its tokens or what of them is learned."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lightning_mm.data.collator import Collator
from lightning_mm.data.image_source import ImageBytes
from lightning_mm.data.sample import Sample, Turn
from lightning_mm.execution.cache.collators import InseparableRowsError, RowKeys, split_row
from lightning_mm.models.processor import load_processor
from tests.helpers.data import Family
from tests.helpers.videos import write_video


@pytest.fixture
def row(tmp_path: Path) -> Sample:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    turns = (Turn("user", "<image><video>?"), Turn("assistant", "A."), Turn("user", "?"), Turn("assistant", "B."))
    video = ImageBytes("v", b"video")
    return Sample("1", turns, (tmp_path / "a.png",), "t.json:1", videos=(video,))


def with_answer(row: Sample, **changes: object) -> Sample:
    turns = list(row.turns)
    turns[1] = replace(turns[1], **changes)  # type: ignore[arg-type]
    return replace(row, turns=tuple(turns))


def test_every_change_of_a_row_changes_its_key(row: Sample, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b.png")
    rows = [
        row,
        with_answer(row, text="C."),
        with_answer(row, train=False),
        with_answer(row, reasoning="So."),
        with_answer(row, tool_calls="[]"),
        replace(row, tools="[]"),
        replace(row, images=(tmp_path / "b.png",)),
        replace(row, videos=(ImageBytes("v", b"another"),)),
        replace(row, videos=()),
        replace(row, images=(), videos=(*row.videos, ImageBytes("v", (tmp_path / "a.png").read_bytes()))),
    ]
    assert len({RowKeys()(each) for each in rows}) == len(rows)
    same = replace(row, id="2", origin="u.json:9", images=(ImageBytes("x", (tmp_path / "a.png").read_bytes()),))
    assert RowKeys()(same) == RowKeys()(row)


def test_the_key_of_a_folder_of_frames_is_that_of_its_files(row: Sample, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    keys = set()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
        keys.add(RowKeys()(replace(row, videos=(folder,))))
    assert len(keys) == 3


def test_rows_with_videos_are_not_taken_apart(family: Family, tmp_path: Path) -> None:
    """Seconds between frames are floating-point, as pixels are, and decide positions."""
    video = write_video(tmp_path / "a.mp4", 4)
    turns = (Turn("user", "<video>?"), Turn("assistant", "A."))
    row = Sample("1", turns, (), "1", videos=(video,))
    batch = Collator(load_processor(str(family("qwen2_5_vl"))), video_frames=2)([row])
    with pytest.raises(InseparableRowsError, match="video"):
        split_row(batch)
