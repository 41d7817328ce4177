"""Findings into a run's files, and the first reading kept so that a resumed run still knows where it came from.

Data flow: ``Findings`` -> layers.csv, matrices.json, inspections.json; first ``Reading`` -> readings/start.safetensors.
"""

import json
import shutil
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_mm.analysis.findings import Findings
from lightning_mm.dashboards.layers_file import append_layers, append_matrix, read_layers
from lightning_mm.dashboards.rundir import RunDirectory, read_json, write_json
from lightning_mm.data.probe_sets import ProbeSet
from lightning_mm.decisions import decide
from lightning_mm.errors import UserError
from lightning_mm.taps.reading import Reading

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
        write_json(self.run.inspections, [*(x for x in self._inspections() if x.get("step") != found.step), told])

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

    def _inspections(self) -> list[dict[str, Any]]:
        try:
            held = read_json(self.run.inspections)
        except UserError:
            return []
        return [row for row in held if isinstance(row, dict)] if isinstance(held, list) else []


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
