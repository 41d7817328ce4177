"""layers.csv and matrices.json: the measurements of every layer, kept whole when a run is killed or resumed.

One process writes. Rows of a step that was inspected before are replaced, because a resumed run repeats inspections of
steps after its checkpoint.

Data flow: ``analysis.findings`` -> rows -> layers.csv -> ``read_layers`` -> ``report``.

Shapes: L layers; layer -1 is the embeddings, layer i the output of decoder block i.
"""

import csv
import io
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning_mm.core.errors import UserError
from lightning_mm.core.estimate import Estimate
from lightning_mm.core.io import read_json_rows, write_atomically, write_json
from lightning_mm.core.run_directory import RunDirectory

MOST_LAYERS = 1000
"""No decoder has more layers; a line with a larger number is damaged."""
log = logging.getLogger("lightning_mm")


@dataclass(frozen=True)
class LayerKey:
    """What a row of layers.csv measures: rows with the same key replace each other.

    Args:
        step: Optimizer steps done.
        analysis: What measured it: probing, geometry, drift, causal or selection.
        measure: The measure's name, as ``measure_catalog.measure`` knows it.
        site: Token position or modality it was measured at: last, image, text, ... or ``image~text`` for a pair; empty
            for a measure without one.
        layer: -1 for the embeddings, i for the output of decoder block i.
    """

    step: int
    analysis: str
    measure: str
    site: str
    layer: int


@dataclass(frozen=True)
class LayerRow(Estimate, LayerKey):
    """An ``Estimate`` with its key. The fields, key first, are the columns of layers.csv in this order."""

    @property
    def key(self) -> tuple[int, str, str, str, int]:
        """The fields of ``LayerKey``."""
        return self.step, self.analysis, self.measure, self.site, self.layer


COLUMNS = tuple(field.name for field in fields(LayerRow))


def append_layers(path: Path, rows: Iterable[LayerRow]) -> None:
    """Add rows to layers.csv; a row of the same step, analysis, measure, site and layer is replaced.

    A kill cuts at most the last line, which the next call removes.

    Args:
        path: The file; created if it does not exist.
        rows: The rows of one inspection, or of one analysis of it.
    """
    new = list(rows)
    old = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    met = any(f"\n{step}," in old for step in {row.step for row in new})
    if old.startswith(",".join(COLUMNS) + "\n") and old.endswith("\n") and not met:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(_lines(new))
        return
    before, bad = parse_layers(old)
    if bad:
        log.warning("%s: %d lines that hold no measurement are removed", path.name, bad)
    kept = {row.key: row for row in [*before, *new]}
    write_atomically(path, layers_text(kept.values()))


def read_layers(path: Path) -> tuple[list[LayerRow], int]:
    """The rows of layers.csv in file order, and the number of damaged lines (a kill can cut the last one).

    Args:
        path: The file.

    Raises:
        UserError: If the file is missing or cannot be read at all.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path.name} is missing.", str(error), "Let an inspection write it.") from error
    return parse_layers(text)


def append_matrix(
    run: RunDirectory, step: int, measure: str, site: str, layers: Sequence[int], values: Sequence[Sequence[float]]
) -> None:
    """Add a layer by layer matrix to matrices.json; one of the same step, measure and site is replaced.

    Args:
        run: The run directory.
        step: Optimizer steps done.
        measure: Name of the measure, such as cka.
        site: Site of the rows and of the columns.
        layers: Layers of the rows and columns.
        values: (L, L); values that are not finite become null.
    """
    rounded = [[round(float(value), 5) for value in row] for row in values]
    matrix = {"step": step, "measure": measure, "site": site, "layers": list(layers), "values": rounded}
    write_json(run.matrices, [*(old for old in read_json_rows(run.matrices) if not _same(old, matrix)), matrix])


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("step", "measure", "site"))


def _lines(rows: Iterable[LayerRow]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(getattr(row, name)) for name in COLUMNS] for row in rows)
    return text.getvalue()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.7g}" if math.isfinite(value) else ""
    if isinstance(value, tuple):
        value = "; ".join(note.replace("; ", ", ") for note in value)
    return "" if value is None else " ".join(str(value).split())  # one row is one line: notes may hold line breaks


def layers_text(rows: Iterable[LayerRow]) -> str:
    """What layers.csv holds of these rows."""
    return ",".join(COLUMNS) + "\n" + _lines(rows)


def parse_layers(text: str) -> tuple[list[LayerRow], int]:
    """Rows of the content of layers.csv, and number of damaged lines.

    Each line is parsed by itself, so that a stray quote damages only its own.
    """
    lines = [line for line in text.split("\n")[:-1] if line.strip()]  # a line without a line end was cut
    cut = int(bool(text.rpartition("\n")[2].strip()))
    columns = _cells(lines[0]) if lines else []
    rows = [_parse_line(columns, _cells(line)) for line in lines[1:]]
    kept = [row for row in rows if row is not None]
    return kept, len(rows) - len(kept) + cut


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _parse_line(columns: Sequence[str], cells: Sequence[str]) -> LayerRow | None:
    """The row of a line; None where it holds none: a number that does not parse, for instance."""
    if len(cells) != len(columns):
        return None
    of = dict.fromkeys(COLUMNS, "") | dict(zip(columns, cells, strict=True))
    try:
        parsed: dict[str, Any] = {field.name: _PARSERS[field.type](of[field.name]) for field in fields(LayerRow)}
    except ValueError:
        return None
    if not (0 <= parsed["step"] < 10**12 and -1 <= parsed["layer"] < MOST_LAYERS and parsed["measure"]):
        return None
    if parsed["value"] is None:
        parsed["undefined"] = parsed["undefined"] or "no value"
    elif parsed["undefined"]:
        return None
    return LayerRow(**parsed)


def _number(cell: str) -> float | None:
    if not cell:
        return None
    value = float(cell)
    return value if math.isfinite(value) and abs(value) < 1e100 else None


_PARSERS: dict[object, Callable[[str], object]] = {
    int: int,
    str: str,
    float | None: _number,
    int | None: lambda cell: int(cell) if cell else None,
    tuple[str, ...]: lambda cell: tuple(filter(None, cell.split("; "))),
}
"""Cell -> value, by the type of the field."""
