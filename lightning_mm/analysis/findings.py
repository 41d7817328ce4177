"""The result of an analysis: a table with one row per layer and measure, matrices, and the few numbers that sum it up.

Data flow: lists of ``Estimate`` by slice -> ``Findings`` -> layers.csv, matrices.json, the metrics of the run.
Slice 0 of a reading is called layer -1 (the embeddings), slice i + 1 layer i (the output of block i).

Findings into a run's files, and the first reading kept so that a resumed run still knows where it came from.

Data flow: ``Findings`` -> layers.csv, matrices.json, inspections.json; first ``Reading`` -> readings/start.safetensors.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_mm.analysis.hidden_states import Reading
from lightning_mm.core.decisions import decide
from lightning_mm.core.estimate import Estimate
from lightning_mm.core.io import read_json, read_json_rows, write_json
from lightning_mm.core.layer_table import LayerRow, append_layers, append_matrix, read_layers
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.probe_sets.probe_set import ProbeSet


@dataclass(frozen=True)
class Matrix:
    """One number for every pair of layers.

    Args:
        measure: Its name.
        site: Where the rows, and the columns, were read.
        values: (T, T); NaN where undefined.
    """

    measure: str
    site: str
    values: Tensor


@dataclass
class Findings:
    """What one inspection found.

    Args:
        step: Optimizer steps done.
        rows: One per layer, measure and site.
        matrices: One per measure over pairs of layers.
        problems: What could not be analysed at all, and why.
    """

    step: int
    rows: list[LayerRow] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, analysis: str, measure: str, site: str, estimates: Sequence[Estimate], first: int = -1) -> None:
        """Put down one measure of all slices, or of the layers from ``first`` on."""
        self.rows += [_row(self.step, analysis, measure, site, layer, e) for layer, e in enumerate(estimates, first)]

    def take(self, part: "Findings") -> None:
        """Add what another analysis of the same step found."""
        self.rows += part.rows
        self.matrices += part.matrices
        self.problems += part.problems

    def profile(self, measure: str, site: str) -> dict[int, LayerRow]:
        """One measure by layer; empty where it was not made."""
        return {row.layer: row for row in self.rows if (row.measure, row.site) == (measure, site)}


def _row(step: int, analysis: str, measure: str, site: str, layer: int, e: Estimate) -> LayerRow:
    return LayerRow(
        step=step,
        analysis=analysis,
        measure=measure,
        site=site,
        layer=layer,
        value=e.value,
        low=e.low,
        high=e.high,
        null=e.null,
        null_low=e.null_low,
        null_high=e.null_high,
        n=e.n,
        k=e.k,
        undefined=e.undefined,
        notes="; ".join(note.replace("; ", ", ") for note in e.notes),
    )


COMPARED = ("picture/last", "picture/image", "text/last")
"""The places of the first reading that later ones are compared with."""


class Recorder:
    """Writes what is found; on rank 0 only.

    Args:
        run: The folder.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def probes(self, probe_set: ProbeSet) -> None:
        """What was asked: probes.json, and the rows themselves."""
        self.run.path.mkdir(parents=True, exist_ok=True)
        write_json(self.run.probes, probe_set.summary())
        probe_set.save(self.run.path / "probe_set.json")

    def write(self, found: Findings, forward: float, analyses: float, share: float | None = None) -> None:
        """One inspection; ``share`` is that of the training time, where there is any."""
        append_layers(self.run.layers, found.rows)
        for matrix in found.matrices:
            layers = list(range(-1, matrix.values.shape[0] - 1))
            append_matrix(self.run, found.step, matrix.measure, matrix.site, layers, matrix.values.tolist())
        told = {
            "step": found.step,
            "seconds": {"forward": forward, "analyses": analyses},
            "share": share,
            "problems": found.problems,
        }
        others = [row for row in read_json_rows(self.run.inspections) if row.get("step") != found.step]
        write_json(self.run.inspections, [*others, told])

    def keep_start(self, reading: Reading, probe_set: ProbeSet) -> None:
        """Keep the first reading of a run."""
        file = self.run.path / "readings" / "start.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {place: x.contiguous() for place, x in reading.features.items() if place in COMPARED}
        addresses = {place: reading.addresses[place] for place in kept}
        told = {"step": str(reading.step), "hash": probe_set.hash, "addresses": json.dumps(addresses)}
        save_file(kept, file, metadata=told)

    def start_reading(self, probe_set: ProbeSet) -> Reading | None:
        """The first reading of the run that is resumed; None, and said why, where it cannot be had."""
        file = self.run.path / "readings" / "start.safetensors"
        try:
            with safe_open(file, framework="pt") as held:
                told = held.metadata()
                if told["hash"] != probe_set.hash:
                    raise KeyError("it was made with another probe set")
                features = {place: held.get_tensor(place) for place in held.keys()}  # noqa: SIM118  (no mapping)
            addresses = {
                place: tuple((a, b) for a, b in found) for place, found in json.loads(told["addresses"]).items()
            }
            return Reading(int(told["step"]), features, addresses)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            decide("inspection.drift", "not measured", f"the reading before the first step is not at hand: {error}")
            return None


def carry_over(earlier: RunDirectory, run: RunDirectory, step: int) -> None:
    """Give a resumed run what the earlier one found up to ``step``, its choice of layers, and its first reading."""
    if earlier.path == run.path:
        return
    rows = [row for row in read_layers(earlier.layers)[0] if row.step <= step] if earlier.layers.is_file() else []
    if rows:
        append_layers(run.layers, rows)
    for held, kept in ((earlier.inspections, run.inspections), (earlier.matrices, run.matrices)):
        if held.is_file():
            write_json(kept, [row for row in read_json(held) if row.get("step", 0) <= step])
    if earlier.selection.is_file():
        shutil.copyfile(earlier.selection, run.selection)
    start = earlier.path / "readings" / "start.safetensors"
    if start.is_file():
        (run.path / "readings").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(start, run.path / "readings" / "start.safetensors")
