"""Checks pictures and videos of a stored table before a run: which rows cannot be used, and the size of each.

What was found of a file holds while its size and time stay as they are; at every start the files are looked up again,
so that a picture that was mended or removed is noticed.

Data flow: ``part-00000.arrow`` -> ``check_pictures`` (in worker processes) -> ``part-00000.images.arrow`` and
``part-00000.videos.arrow`` beside it -> ``CheckedPart``: sizes, and the faults of rows.

Shapes: a part has R rows with P pictures, or videos, in the order of rows.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.processes import run_in_processes
from lightning_mm.data.image_source import ImageSource, StoredImage, open_arrow
from lightning_mm.data.images import BadImage, check_image
from lightning_mm.data.videos import can_decode, check_video

_SCHEMA = pa.schema(
    [
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
        ("time", pa.int64()),
        ("decoded", pa.bool_()),
        ("fault", pa.string()),
    ]
)
"""One row per picture: size as displayed, in pixels; state of its file (-1: none, or not a file); '' for no fault."""
_MAX_DECODED = 2_000
Row = tuple[int, int, int, int, bool, str]
Size = tuple[int, int]
Column = Literal["images", "videos"]
COLUMNS: tuple[Column, ...] = ("images", "videos")
"""Of a table, which are checked."""


@dataclass(frozen=True)
class CheckedPart:
    """What was found of the pictures of one part.

    Args:
        starts: (R + 1,) index of the first picture of each row.
        sizes: (P, 2) width and height in pixels as displayed; zeros where the picture cannot be opened.
        faults: Picture -> why it cannot be used, whatever the limits are.
        all_decoded: Whether each was decoded; False for videos that nothing here decodes.
    """

    starts: NDArray[np.int64]
    sizes: NDArray[np.int32]
    faults: dict[int, str]
    all_decoded: bool = True

    def sizes_of(self, row: int) -> tuple[Size, ...]:
        """Width and height of each picture of a row."""
        return tuple((int(w), int(h)) for w, h in self.sizes[self.starts[row] : self.starts[row + 1]])

    def row_faults(self, max_megapixels: float) -> dict[int, str]:
        """Row -> why its first bad picture cannot be used, with this limit on the size of a picture."""
        found = dict(self.faults)
        for picture in np.flatnonzero(self.sizes.prod(1, dtype=np.int64) > max_megapixels * 1e6).tolist():
            width, height = self.sizes[picture]
            found.setdefault(picture, f"image too large: {width} x {height} is over {max_megapixels:g} megapixels")
        rows: dict[int, str] = {}
        for picture in sorted(found):
            rows.setdefault(int(np.searchsorted(self.starts, picture, side="right")) - 1, found[picture])
        return rows


def check_pictures(files: Sequence[Path], num_workers: int, max_megapixels: float) -> None:
    """Check the pictures and videos of these parts, as far as they are not known from before.

    Args:
        files: Arrow files of the parts.
        num_workers: Processes that check; 0 and 1 check in this one.
        max_megapixels: No larger picture is decoded, in megapixels.
    """
    number, num_videos = (sum(int(_starts(file, column)[-1]) for file in files) for column in COLUMNS)
    decode = number <= _MAX_DECODED
    if number:
        how = "each is decoded" if decode else f"headers and ends; more than {_MAX_DECODED} are not all decoded"
        log_decision("data.picture_check", f"{number} pictures", how)
    if num_videos:
        log_decision("data.video_check", f"{num_videos} videos", "each is opened, and one frame of it decoded")
    jobs = [(file, column, decode or column == "videos", max_megapixels) for file in files for column in COLUMNS]
    run_in_processes(_check_part, jobs, num_workers, "checking pictures")


def is_checked(file: Path) -> bool:
    """Whether the pictures and videos of a part have been checked."""
    return all(_checked_file(file, column).exists() for column in COLUMNS)


def check_state(file: Path) -> tuple[tuple[int, int], ...]:
    """Size and time of what is known of a part: equal where two ranks see the same checks; () without any."""
    if not is_checked(file):
        return ()
    stats = [_checked_file(file, column).stat() for column in COLUMNS]
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


def checked_part(file: Path, column: Column = "images") -> CheckedPart:
    """What ``check_pictures`` found of the pictures, or of the videos, of a part when it was last called."""
    state = _checked_file(file, column).stat()
    return _read_part(file, column, (state.st_ino, state.st_mtime_ns))


@lru_cache(maxsize=4096)
def _read_part(file: Path, column: Column, state: tuple[int, int]) -> CheckedPart:
    """A part's checks; each check that finds something new writes a new file."""
    starts = _starts(file, column)
    table = pa.ipc.open_stream(pa.memory_map(str(_checked_file(file, column)))).read_all()
    sizes = np.stack([table["width"].to_numpy(), table["height"].to_numpy()], axis=1)
    bad = np.flatnonzero(pc.not_equal(table["fault"], "").to_numpy(zero_copy_only=False)).tolist()
    faults = {picture: table["fault"][picture].as_py() for picture in bad}
    return CheckedPart(starts, sizes, faults, all(table["decoded"].to_pylist()))


def _check_part(file: Path, column: Column, decode: bool, max_megapixels: float) -> None:
    target = _checked_file(file, column)
    before: list[Row] = []
    if target.exists():
        before = [tuple(row.values()) for row in pa.ipc.open_stream(pa.memory_map(str(target))).read_all().to_pylist()]
    check = _PictureCheck(column, decode, max_megapixels)
    images = _pictures(file, column)
    after = [check(image, before[number] if before else None) for number, image in enumerate(images)]
    if after == before and target.exists():
        return
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    columns = zip(*after, strict=True) if after else [()] * len(_SCHEMA)
    arrays = [pa.array(column, each.type) for column, each in zip(columns, _SCHEMA, strict=True)]
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        writer.write_table(pa.table(arrays, _SCHEMA))
    temporary.replace(target)


class _PictureCheck:
    """Checks pictures or videos one by one, each file once."""

    def __init__(self, column: Column, decode: bool, max_megapixels: float) -> None:
        self._column, self._decode, self._max_megapixels = column, decode, max_megapixels
        self._known: dict[ImageSource, Row] = {}

    def __call__(self, image: ImageSource, before: Row | None) -> Row:
        if (known := self._known.get(image)) is not None:
            return known
        state = _state(image)
        if before is not None and before[2:4] == state and (before[4] or not self._decode):
            row = before
        else:
            row = self._found(image, state)
        self._known[image] = row
        return row

    def _found(self, image: ImageSource, state: tuple[int, int]) -> Row:
        width = height = 0
        try:
            if self._column == "videos":
                if not can_decode(image):
                    return width, height, *state, False, ""
                width, height = check_video(image, self._max_megapixels)
            else:
                width, height = check_image(image, self._max_megapixels, self._decode)
        except BadImage as error:
            return width, height, *state, self._decode, str(error)
        return width, height, *state, self._decode, ""


def _state(image: ImageSource) -> tuple[int, int]:
    """Size and time of a file, or of all in a folder; -1 where there is none, and for a picture that cannot change."""
    if isinstance(image, Path):
        try:
            stats = [each.stat() for each in (image.iterdir() if image.is_dir() else [image])]
            return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=-1)
        except OSError:
            pass
    return -1, -1


def _checked_file(file: Path, column: Column) -> Path:
    return file.with_suffix(f".{column}.arrow")


def _starts(file: Path, column: Column) -> NDArray[np.int64]:
    lengths = pc.list_value_length(open_arrow(file)[column]).to_numpy()
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _pictures(file: Path, column: Column) -> list[ImageSource]:
    """The P pictures, or videos, of a part."""
    starts = _starts(file, column)
    cells = pc.list_flatten(open_arrow(file)[column]).to_pylist()
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts)).tolist()
    return [
        StoredImage(file, row, flat - int(starts[row]), os.fsdecode(cell["path"]), column)
        if cell["stored"]
        else Path(os.fsdecode(cell["path"]))
        for flat, (row, cell) in enumerate(zip(rows, cells, strict=True))
    ]
