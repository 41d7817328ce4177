"""layers.csv and matrices.json: what was measured in each layer, kept whole when a run is killed or resumed.

Data flow: an inspection's rows -> layers.csv; ``local`` and ``online`` read them back. One process writes. Rows of a
step that was inspected before are replaced: a resumed run looks again at steps that it had already seen.

Shapes: L layers; layer -1 is the embeddings, layer i the output of decoder block i.
"""

import csv
import io
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json_rows, write_atomically, write_json
from lightning_mm.core.run_directory import RunDirectory

MOST_LAYERS = 1000
"""No decoder has so many; a larger number in a file is a fault of the file."""
log = logging.getLogger("lightning_mm")


@dataclass(frozen=True)
class LayerRow:
    """One number measured in one layer at one step, in the order of the columns of layers.csv.

    Args:
        step: Optimizer steps done.
        analysis: What measured it: probing, geometry, drift or selection.
        measure: The measure's name, as ``measures.measure`` knows it.
        site: Where it was read: last, image, text, ... or ``image~text`` for a pair; empty where that has no meaning.
        layer: -1 for the embeddings, i for the output of decoder block i.
        value: The number; None where it is undefined.
        low: Lower end of its 95 % interval.
        high: Upper end.
        null: What chance would give.
        null_low: Lower end of the band that 95 % of chance results fall in.
        null_high: Upper end.
        n: Samples it rests on.
        k: Neighbours, classes or components it was computed with.
        undefined: Why there is no value.
        notes: What a reader must know, joined by "; ".
    """

    step: int
    analysis: str
    measure: str
    site: str
    layer: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    null: float | None = None
    null_low: float | None = None
    null_high: float | None = None
    n: int | None = None
    k: int | None = None
    undefined: str = ""
    notes: str = ""


COLUMNS = tuple(field.name for field in fields(LayerRow))
_NUMBERS = ("value", "low", "high", "null", "null_low", "null_high")
_Place = tuple[int, str, str, str, int]


def append_layers(path: Path, rows: Iterable[LayerRow]) -> None:
    """Add rows to layers.csv; a row of the same step, analysis, measure, site and layer is replaced.

    A kill cuts at most the last line, which the next call removes.

    Args:
        path: The file; it is made where there is none.
        rows: The rows of one inspection, or of one analysis of it.
    """
    new = list(rows)
    old = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    met = any(f"\n{step}," in old for step in {row.step for row in new})
    if old.startswith(",".join(COLUMNS) + "\n") and old.endswith("\n") and not met:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(_lines(new))
        return
    before, bad = _parsed(old)
    if bad:
        log.warning("%s: %d lines that hold no measurement are removed", path.name, bad)
    kept = {_place(row): row for row in [*before, *new]}
    write_atomically(path, ",".join(COLUMNS) + "\n" + _lines(kept.values()))


def read_layers(path: Path) -> tuple[list[LayerRow], int]:
    """The rows of layers.csv in file order, and how many lines hold none (a kill can cut the last one).

    Raises:
        UserError: If the file is missing or cannot be read at all.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path.name} is missing.", str(error), "Let an inspection write it.") from error
    return _parsed(text)


def append_matrix(
    run: RunDirectory, step: int, measure: str, site: str, layers: Sequence[int], values: Sequence[Sequence[float]]
) -> None:
    """Add a layer by layer matrix to matrices.json; one of the same step, measure and site is replaced.

    Args:
        run: The run's folder.
        step: Optimizer steps done.
        measure: Such as cka.
        site: Where its rows, and its columns, were read.
        layers: The layers of its rows and columns.
        values: (L, L); values that are not finite become null.
    """
    rounded = [[round(float(value), 5) for value in row] for row in values]
    matrix = {"step": step, "measure": measure, "site": site, "layers": list(layers), "values": rounded}
    write_json(run.matrices, [*(old for old in read_json_rows(run.matrices) if not _same(old, matrix)), matrix])


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("step", "measure", "site"))


def _place(row: LayerRow) -> _Place:
    return row.step, row.analysis, row.measure, row.site, row.layer


def _lines(rows: Iterable[LayerRow]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(value) for value in astuple(row)] for row in rows)
    return text.getvalue()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.7g}" if math.isfinite(value) else ""
    return "" if value is None else " ".join(str(value).split())  # one row is one line, whatever a note holds


def _parsed(text: str) -> tuple[list[LayerRow], int]:
    """Each line by itself: a stray quote costs its own line only."""
    lines = [line for line in text.split("\n")[:-1] if line.strip()]  # what no line end follows was cut
    cut = int(bool(text.rpartition("\n")[2].strip()))
    columns = _cells(lines[0]) if lines else []
    rows = [_row(columns, _cells(line)) for line in lines[1:]]
    kept = [row for row in rows if row is not None]
    return kept, len(rows) - len(kept) + cut


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _row(columns: Sequence[str], cells: Sequence[str]) -> LayerRow | None:
    """The row that a line holds, or None: a number that is none, or a layer that cannot be, condemns it."""
    if len(cells) != len(columns):
        return None
    of = dict.fromkeys(COLUMNS, "") | dict(zip(columns, cells, strict=True))
    try:
        step, layer = int(of["step"]), int(of["layer"])
        value, low, high, null, null_low, null_high = (_number(of[name]) for name in _NUMBERS)
        n, k = (int(of[name]) if of[name] else None for name in ("n", "k"))
    except ValueError:
        return None
    if not (0 <= step < 10**12 and -1 <= layer < MOST_LAYERS and of["measure"]):
        return None
    why = of["undefined"] or ("" if value is not None else "no value")
    named = (step, of["analysis"], of["measure"], of["site"], layer)
    return LayerRow(*named, value, low, high, null, null_low, null_high, n, k, why, of["notes"])


def _number(cell: str) -> float | None:
    if not cell:
        return None
    value = float(cell)
    return value if math.isfinite(value) and abs(value) < 1e100 else None
