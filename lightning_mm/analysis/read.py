"""Look inside any loaded model, in a loop of one's own: hidden states of every layer, and what is found in them.

Data flow: model, processor, rows -> ``read_hidden_states`` -> ``probe_hidden_states``, ``measure_hidden_states``,
``compare_hidden_states`` -> ``Findings`` (a ``LayerRow`` per layer and measure) -> ``save_findings`` -> layers.csv,
report.html.

Example::

    model = AutoModelForImageTextToText.from_pretrained("org/name")
    processor = AutoProcessor.from_pretrained("org/name")
    before = read_hidden_states(model, processor, "probes.json")
    ...  # train in any way
    after = read_hidden_states(model, processor, "probes.json", step=1000)
    found = [probe_hidden_states(before), probe_hidden_states(after), compare_hidden_states(before, after)]
    print(found[1].profile("entailment/random", "last")[12].value)  # accuracy at the output of block 12
    save_findings("runs/looked-into", *found, model=model)
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_mm.analysis.drift import measure_drift
from lightning_mm.analysis.findings import Findings, FindingsWriter
from lightning_mm.analysis.geometry import DEFAULT_MEASURES, measure_geometry, resolve_measures
from lightning_mm.analysis.hidden_states import HiddenStates, extract_hidden_states, in_own_dtype, merge_hidden_states
from lightning_mm.analysis.probing import ProbingOptions, run_probes
from lightning_mm.core.decisions import log
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_json
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.probe_sets.build import ENTAILMENT_PROMPT
from lightning_mm.data.probe_sets.collator import ProbeCollator, cut_batches
from lightning_mm.data.probe_sets.given import open_probes
from lightning_mm.data.probe_sets.probe_set import ProbeBatch, ProbeSet
from lightning_mm.data.readers.rows import PathLike, Rows
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.models.guest import open_model
from lightning_mm.models.handle import MultimodalModel, unwrap_model
from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.side_effects import without_side_effects
from lightning_mm.report.html import write_report
from lightning_mm.tuning.census import take_census
from lightning_mm.tuning.found_plan import plan_as_found


def read_hidden_states(
    model: nn.Module,
    processor: Any,  # noqa: ANN401  (any processor of transformers)
    rows: PathLike | Rows | ProbeSet,
    *,
    image_root: PathLike | None = None,
    max_pictures: int = 256,
    batch_size: int = 8,
    max_length: int | None = None,
    prompt: str = ENTAILMENT_PROMPT,
    blank: bool = False,
    step: int = 0,
) -> HiddenStates:
    """Hidden states of every layer on some rows, pooled by region; the model is left exactly as it was.

    Train and eval modes, ``requires_grad``, gradients, random generators, hooks, forward passes, gradient
    checkpointing, device and dtype are untouched, so that training goes on bit for bit as without the call. The
    forward pass runs without gradients, in eval mode, uncompiled, and under the autocast that is on. Every process
    reads all rows by itself: in a run of several, call it on rank 0, or on each.

    Args:
        model: A multimodal LLM of transformers, bare or in a wrapper of PEFT, DDP or torch.compile, on any device.
        processor: What ``AutoProcessor`` gave for it; it is not changed.
        rows: A ``ProbeSet``, a file, or rows in memory: pictures with captions and objects, such as
            ``{"image": "a.jpg", "caption": "a cat", "objects": [{"name": "cat", "box": [0, 0, 9, 9]}]}``, or LLaVA's
            conversations.
        image_root: Folder that pictures are relative to; None: the file's own, for rows the current folder.
        max_pictures: Largest number of pictures; default 256.
        batch_size: Rows per forward pass; default 8.
        max_length: Longest row in tokens, longer ones are rejected; None (default): no limit.
        prompt: Prompt of the entailment rows, with ``{caption}`` in it.
        blank: Read the entailment rows only, with gray pictures: what language alone gives.
        step: Optimizer steps done, kept in the result.

    Returns:
        (T, N, D) float32 features by position; T: embeddings and the output of each block, N rows, D hidden size.
        Rows that could not be used are in ``rejected``, and logged.

    Raises:
        UserError: The model or processor cannot be read, or no row can be used.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}.", "Nothing would be read.", "Give 1 or more.")
    mm, rejected = open_model(model, processor), RejectedSamples(max_bad_fraction=1.0)
    with without_side_effects(model):
        probe_set = open_probes(rows, rejected, image_root=image_root, max_pictures=max_pictures, prompt=prompt)
        read = probe_set.without_pictures() if blank else probe_set
        batches = _batches(mm, read, batch_size, max_length)
        states = extract_hidden_states(mm, batches, mm.device, step=step, begin=in_own_dtype(mm, mm.device))
    states = merge_hidden_states([states], probe_set)
    states = replace(states, rejected=(*rejected, *states.rejected), probe_set=probe_set)
    for problem in states.problems:
        log.warning("read_hidden_states: %s", problem)
    return states


def _batches(mm: MultimodalModel, probe_set: ProbeSet, size: int, max_length: int | None) -> Iterator[ProbeBatch]:
    collator = ProbeCollator(mm.required_processor, max_length)
    collator.log_missing_object_sites(probe_set.rows)
    return (collator(rows) for rows in cut_batches(probe_set.rows, size))


def probe_hidden_states(
    states: HiddenStates,
    blank: HiddenStates | None = None,
    options: ProbingOptions = ProbingOptions(),  # noqa: B008
) -> Findings:
    """Linear probes of every layer.

    Args:
        states: As ``read_hidden_states`` returns them.
        blank: The same with gray pictures (``blank=True``), for the baseline without them; None (default): no baseline.
        options: Which probes, and what is measured beside their accuracy.

    Raises:
        UserError: The states were not read by ``read_hidden_states``.
    """
    return run_probes(states, blank, _rows_of(states), options, torch.device("cpu"))


def measure_hidden_states(
    states: HiddenStates, measures: Sequence[str] = DEFAULT_MEASURES, neighbors: int = 10
) -> Findings:
    """Geometry of every layer: intrinsic dimension, spectra, CKA, neighborhood overlap, modality gap and more.

    Args:
        states: As ``read_hidden_states`` returns them.
        measures: Names of measures; one of each kind by default, ``["all"]`` for all.
        neighbors: k of the neighborhood measures; fewer where there are fewer than ten times as many pictures.

    Raises:
        UserError: There is no such measure, or the states were not read by ``read_hidden_states``.
    """
    return measure_geometry(states, _rows_of(states), resolve_measures(measures), neighbors, torch.device("cpu"))


def compare_hidden_states(before: HiddenStates, after: HiddenStates, neighbors: int = 10) -> Findings:
    """Similarity of every layer to itself at an earlier time, on the same rows.

    Args:
        before: Hidden states then.
        after: Hidden states now.
        neighbors: k of the neighborhood overlap; fewer where there are fewer than ten times as many pictures.

    Raises:
        UserError: They were not read by ``read_hidden_states``, or not on the same rows.
    """
    rows = _rows_of(after)
    if _rows_of(before).hash != rows.hash:
        raise UserError(
            "The hidden states cannot be compared.", "They were read on other rows.", "Read both on the same rows."
        )
    return measure_drift(before, after, rows, neighbors, torch.device("cpu"))


def save_findings(folder: PathLike, *found: Findings, model: nn.Module | None = None) -> Path:
    """Write findings to a folder; those of another step are kept, so that a loop may call it after each look.

    Args:
        folder: Made if it is not there.
        found: What was found, of one step or of several.
        model: The model, whose trained layers the report then marks; None (default): it marks none.

    Returns:
        The path of report.html.
    """
    run = RunDirectory(Path(folder).absolute())
    run.path.mkdir(parents=True, exist_ok=True)
    writer = FindingsWriter(run)
    for step in dict.fromkeys(each.step for each in found):
        together = Findings(step)
        for each in found:
            if each.step == step:
                together.extend(each)
        writer.write(together, 0.0, 0.0)
    if model is not None:
        plain = unwrap_model(model)
        mm = MultimodalModel(plain, ModelLayout.of(plain).without_adapters())
        write_json(run.inspection, {"title": f"Inside {type(plain).__name__}", "model": "", "labels": {}})
        write_json(run.census, take_census(mm, plan_as_found(mm)).to_dict())
    return write_report(run.path)


def _rows_of(states: HiddenStates) -> ProbeSet:
    if states.probe_set is None:
        raise UserError(
            "These hidden states do not say which rows they are of.",
            "They were not read by read_hidden_states.",
            "Read them with it.",
        )
    return states.probe_set
