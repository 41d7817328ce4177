"""Results of one inspection, and the files of the run directory that they are written to.

Slice 0 of ``HiddenStates`` is layer -1 (the embeddings), slice i + 1 is layer i (the output of decoder block i).

Data flow: lists of ``Estimate`` by slice -> ``Findings`` -> ``FindingsWriter`` -> layers.csv, matrices.json,
inspections.json. The first hidden states of a run go to readings/start.safetensors, so that a resumed run can still
measure drift.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_mm.analysis.hidden_states import SITES, HiddenStates
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.estimate import Estimate
from lightning_mm.core.io import read_json, read_json_rows, write_atomically, write_json
from lightning_mm.core.layer_table import LayerRow, append_layers, append_matrix, layers_text, read_layers
from lightning_mm.core.measure_catalog import measure
from lightning_mm.core.peak_note import peak_note
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.geometry.peak import peak_range

_FIELDS = tuple(each.name for each in fields(Estimate))
"""What a row of layers.csv takes over of an estimate."""


@dataclass(frozen=True)
class LayerMatrix:
    """One number for every pair of layers.

    Args:
        measure: Its name.
        site: Site of the rows and of the columns.
        values: (T, T), T slices; NaN where undefined.
    """

    measure: str
    site: str
    values: Tensor


@dataclass
class Findings:
    """What one inspection measured.

    Args:
        step: Optimizer steps done.
        rows: One per layer, measure and site.
        matrices: One per measure over pairs of layers.
        problems: What could not be analyzed at all, and why.
    """

    step: int
    rows: list[LayerRow] = field(default_factory=list)
    matrices: list[LayerMatrix] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, analysis: str, measure: str, site: str, estimates: Sequence[Estimate], first: int = -1) -> None:
        """Add one measure of consecutive layers; where they were resampled together, the peak's row notes its interval.

        Args:
            analysis: What measured it.
            measure: Its name.
            site: Where it was measured.
            estimates: One per layer.
            first: The layer of the first estimate; -1 is the embeddings.
        """
        estimates = _with_peak_noted(estimates, measure, first)
        self.rows += [
            LayerRow(self.step, analysis, measure, site, layer, **{name: getattr(estimate, name) for name in _FIELDS})
            for layer, estimate in enumerate(estimates, first)
        ]

    def extend(self, part: "Findings") -> None:
        """Add what another analysis of the same step found."""
        self.rows += part.rows
        self.matrices += part.matrices
        self.problems += part.problems

    def profile(self, measure: str, site: str) -> dict[int, LayerRow]:
        """The rows of one measure at one site by layer; empty where it was not measured."""
        return {row.layer: row for row in self.rows if (row.measure, row.site) == (measure, site)}


def _with_peak_noted(estimates: Sequence[Estimate], name: str, first: int) -> Sequence[Estimate]:
    """The estimates with a note, on that of the peak, between which layers it lies."""
    found = peak_range(estimates, measure(name).seek)
    if found is None:
        return estimates
    peak, low, high = found
    return [one.noted(peak_note(low + first, high + first)) if at == peak else one for at, one in enumerate(estimates)]


class FindingsWriter:
    """Writes findings into a run directory. Use it on rank 0 only.

    Args:
        run: The run directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def write_probe_set(self, probe_set: ProbeSet) -> None:
        """Write the summary of the probe set (probes.json) and its rows (probe_set.json)."""
        self.run.path.mkdir(parents=True, exist_ok=True)
        write_json(self.run.probes, probe_set.summary())
        probe_set.save(self.run.path / "probe_set.json")

    def write(self, found: Findings, forward: float, analyses: float, share: float | None = None) -> None:
        """Write one inspection; an earlier one of the same step is replaced.

        Args:
            found: What it measured.
            forward: Seconds of the forward passes.
            analyses: Seconds of the analyses.
            share: Time of all inspections so far over training time; None outside of training.
        """
        append_layers(self.run.layers, found.rows)
        for matrix in found.matrices:
            layers = list(range(-1, matrix.values.shape[0] - 1))
            append_matrix(self.run, found.step, matrix.measure, matrix.site, layers, matrix.values.tolist())
        entry = {
            "step": found.step,
            "seconds": {"forward": forward, "analyses": analyses},
            "share": share,
            "problems": found.problems,
        }
        others = [row for row in read_json_rows(self.run.inspections) if row.get("step") != found.step]
        write_json(self.run.inspections, [*others, entry])

    def save_start(self, states: HiddenStates, probe_set: ProbeSet) -> None:
        """Save the first hidden states of a run, at the positions that drift is measured at."""
        file = self.run.path / "readings" / "start.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        features = {position: x.contiguous() for position, x in states.features.items() if position in SITES.values()}
        samples = {position: states.sample_index[position] for position in features}
        metadata = {"step": str(states.step), "hash": probe_set.hash, "addresses": json.dumps(samples)}
        save_file(features, file, metadata=metadata)

    def load_start(self, probe_set: ProbeSet) -> HiddenStates | None:
        """The first hidden states of the run that is resumed; None, with a logged reason, if they cannot be loaded."""
        file = self.run.path / "readings" / "start.safetensors"
        try:
            with safe_open(file, framework="pt") as saved:
                metadata = saved.metadata()
                if metadata["hash"] != probe_set.hash:
                    raise KeyError("it was made with another probe set")
                features = {position: saved.get_tensor(position) for position in saved.keys()}  # noqa: SIM118  (no mapping)
            samples: dict[str, list[tuple[str, int]]] = json.loads(metadata["addresses"])
            sample_index = {position: tuple((row, number) for row, number in ids) for position, ids in samples.items()}
            return HiddenStates(int(metadata["step"]), features, sample_index)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            log_decision(
                "inspection.drift", "not measured", f"the reading before the first step is not at hand: {error}"
            )
            return None


def copy_earlier_findings(earlier: RunDirectory, run: RunDirectory, step: int) -> None:
    """Give a resumed run what the earlier run found up to a step, its layer selection and first hidden states.

    Args:
        earlier: The run that is resumed.
        run: The run that goes on: a new folder, or the same one, which loses what was found later.
        step: Findings of later steps are left out.
    """
    rows = [row for row in read_layers(earlier.layers)[0] if row.step <= step] if earlier.layers.is_file() else []
    if rows or run.layers.is_file():
        write_atomically(run.layers, layers_text(rows))
    for source, target in ((earlier.inspections, run.inspections), (earlier.matrices, run.matrices)):
        if source.is_file():
            write_json(target, [row for row in read_json(source) if row.get("step", 0) <= step])
    if earlier.path == run.path:
        return
    if earlier.selection.is_file():
        shutil.copyfile(earlier.selection, run.selection)
    start = earlier.path / "readings" / "start.safetensors"
    if start.is_file():
        (run.path / "readings").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(start, run.path / "readings" / "start.safetensors")
