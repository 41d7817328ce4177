"""Tables of metadata beside pictures: an imagefolder of ``datasets``.

Data flow: rows of ``metadata.jsonl``, ``.csv`` or ``.parquet`` -> ``file_name`` becomes ``image``, below the root.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mm.data.readers.row_files import FilePart, RowFile


@dataclass(frozen=True)
class ImageFolder(RowFile):
    """A table of metadata.

    Args:
        path: The file.
        name: What it is called in origins.
        table: Reads the table.
        folder: Its folder, relative to the root of the pictures.
        pictures: Pictures of the wanted split, relative to the root; None for all.
    """

    table: RowFile
    folder: str
    pictures: frozenset[str] | None = None
    format = "imagefolder"

    def identity(self) -> list[str]:
        return [*super().identity(), self.folder, "*" if self.pictures is None else "\n".join(sorted(self.pictures))]

    def parts(self) -> list[FilePart]:
        return self.table.parts()

    def rows(self, part: FilePart) -> Iterator[tuple[str, Any]]:
        for origin, row in self.table.rows(part):
            if not isinstance(row, dict):
                yield origin, row
                continue
            made = {}
            for key, value in row.items():
                if key == "file_name" or key.endswith(("_file_name", "_file_names")):
                    ours = "image" if key == "file_name" else key.rpartition("_file_name")[0]
                    made[ours] = self._placed(value)
                else:
                    made[key] = value
            if self.pictures is None or not isinstance(made.get("image"), str) or made["image"] in self.pictures:
                yield origin, made

    def _placed(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._placed(each) for each in value]
        return os.path.normpath(Path(self.folder) / value) if isinstance(value, str) else value
