"""Where the content of an image or a video is: a file, bytes that were read with its row, or a cell of a table on disk.

Data flow: ``readers`` -> ``Path`` or ``ImageBytes`` -> ``table`` writes the bytes -> ``Path`` or ``StoredImage`` ->
``images`` decodes.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import pyarrow as pa

from lightning_mm.core.io import write_atomically


@dataclass(frozen=True)
class ImageBytes:
    """An encoded image or video that is not a file of its own: a cell of a parquet file, a tar's member, base64 text.

    Args:
        name: What it is called in messages; contents of one name may differ.
        data: Content of the file that it would be.
    """

    name: str
    data: bytes = field(repr=False)

    def read_bytes(self) -> bytes:
        """Content of the file that it would be."""
        return self.data


@dataclass(frozen=True)
class StoredImage:
    """A cell of a table on disk with such bytes, which are read when they are needed.

    Args:
        file: Arrow file with the row.
        row: Row in that file.
        number: Position among the images, or the videos, of the row.
        name: What it is called in messages.
        column: Of the table.
    """

    file: Path
    row: int
    number: int
    name: str
    column: Literal["images", "videos"] = "images"

    def read_bytes(self) -> bytes:
        """Content of the file that it would be."""
        contents = open_arrow(self.file).column(f"{self.column}_bytes")[self.row]
        content: bytes = contents[self.number].as_py()
        return content


ImageSource = Path | ImageBytes | StoredImage
"""An encoded image or video; each has ``name`` and ``read_bytes()``."""


def image_file(image: ImageSource) -> Path:
    """A file with this content: the image's own, or a copy of its cell beside the table.

    Args:
        image: A file, or a cell of a table.
    """
    if isinstance(image, Path):
        return image
    assert isinstance(image, StoredImage), "what is in memory only has no file"
    folder = image.file.parent / "extracted"
    copy = folder / f"{image.file.stem}-{image.row}-{image.number}{Path(image.name).suffix.lower()}"
    if not copy.exists():
        folder.mkdir(exist_ok=True)
        write_atomically(copy, image.read_bytes())
    return copy


@lru_cache(maxsize=4096)
def open_arrow(file: Path) -> pa.Table:
    """A table in Arrow's stream format, mapped into memory: its pages are read when they are touched."""
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
