"""Rows in memory where a verb takes a file of rows: see ``data.readers.rows``."""

from lightning_mm.data.readers.rows import PathLike, Rows, as_file

__all__ = ["PathLike", "Rows", "as_file"]
