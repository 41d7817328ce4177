"""Files that may be compressed, as streams of bytes; read errors name the file.

Data flow: path -> ``open_bytes`` -> a stream of the content -> readers of rows.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from lightning_mm.core.errors import UserError

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
SUFFIXES = frozenset({".gz", ".zst", ".zstd", ".bz2", ".xz"})
"""Suffixes of compressed files, behind the suffix of what they hold."""


def compression_of(path: Path) -> str | None:
    """How a file is compressed, by its first bytes: gzip, zstd, bzip2 or xz; None if it is not."""
    with path.open("rb") as file:
        head = file.read(6)
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The content of a file, decompressed as it is read.

    Args:
        path: A file, compressed or not.

    Raises:
        UserError: The compressed content is cut off or damaged.
    """
    method = compression_of(path)
    with path.open("rb") as raw:
        if method is None:
            yield raw
            return
        try:
            with _decompressed(raw, method) as file:
                yield file
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise UserError(
                f"{path} cannot be decompressed.",
                f"It is a {method} file whose content is cut off or damaged: {error}.",
                "Copy or download it again.",
            ) from error


def _decompressed(raw: IO[bytes], method: str) -> IO[bytes]:
    if method == "zstd":
        stream = pa.CompressedInputStream(pa.PythonFile(raw), "zstd")
        return io.BufferedReader(cast(io.RawIOBase, _Raw(stream)), 1 << 20)
    opener: Any = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[method]
    return cast(IO[bytes], opener(raw, "rb"))


class _Raw(io.RawIOBase):
    """Arrow's stream, which has no lines of its own, as Python's."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)
