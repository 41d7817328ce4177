"""Looks at the data of a run before it trains: what is read, what is dropped and why, lengths, duplicates, samples.

No weights are loaded. Each row goes through the reader, the chat template and the collator that a fit would use, so
that a row that is used here is one that the fit trains.

Data flow: model (its processor only) and data -> ``data.split`` (rows read), ``data.row_meter`` (rows as tokens),
``data.duplicates`` -> ``CheckResult``.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.processes import num_processes
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.duplicates import Overlap, repeated, row_contents
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.row_meter import KINDS, MeasuredRows, measure_rows
from lightning_mm.data.sample import Rejection
from lightning_mm.data.split import Split, refuse_losses
from lightning_mm.models.processor import ModelProcessor, load_processor
from lightning_mm.training.module import MMModule
from lightning_mm.verbs.check_result import CheckedSample, CheckedSource, CheckResult, Lengths
from lightning_mm.verbs.model_source import ModelLike, ModelSource
from lightning_mm.verbs.result import open_decisions
from lightning_mm.verbs.rows import PathLike

Data = Any
"""What ``MMDataModule`` takes as training data, or an ``MMDataModule``."""
SPLITS = ("train", "val", "test")
_BEYOND = "beyond the limit of the source"
_MOST_SAMPLES = 100
"""Most samples of a source."""


@dataclass(frozen=True)
class _CheckedSplit:
    """One split, read and, with a model, tokenized; ``rejections`` is what is not used of it."""

    name: str
    split: Split
    measured: MeasuredRows | None
    rejections: tuple[Rejection, ...]


def check(
    model: ModelLike | None,
    data: Data,
    *,
    val: Data | None = None,
    image_root: PathLike | None = None,
    samples: int = 3,
) -> CheckResult:
    """Look at the data of a run before it trains; no weights are loaded.

    Args:
        model: Model folder or hub name, a ``Backbone``, an ``MMModule`` or a loaded model, of which only the processor
            is used. None: only what can be said without one is, and no row is tokenized.
        data: Training conversations as a data module takes them (a path, rows, a dataset), or a data module with all
            options of a fit.
        val: Validation conversations, where ``data`` is no data module; None: none.
        image_root: Folder that the pictures are relative to, where ``data`` is no data module; None: that of the file.
        samples: Rows of each source that are shown.

    Returns:
        What was found. Too many lost rows are no error here, but ``error`` of the result.

    Raises:
        UserError: There is no such model, or a source cannot be read at all.
    """
    if not 0 <= samples <= _MOST_SAMPLES:
        raise UserError(f"samples is {samples}.", f"It is 0 to {_MOST_SAMPLES}.", "Give --samples 3.")
    with open_decisions() as decisions:
        own = _data(data, val, image_root)
        processing = _processing(model, own)
        own.rows.open(SPLITS)
        splits = [_check_split(own, name, processing) for name in SPLITS if own.paths[name] is not None]
        if not splits:
            raise UserError("There is no data to check.", "No file is given.", "Give --data.train FILE.")
        contents = {each.name: row_contents(each.split.samples, num_processes()) for each in splits}
        train = contents.get("train", [])
        return CheckResult(
            sources=tuple(source for each in splits for source in _sources(each)),
            lengths={each.name: lengths for each in splits if (lengths := _lengths(each.measured)) is not None},
            repeated={name: repeated(rows) for name, rows in contents.items()},
            overlaps={name: Overlap.of(rows, train) for name, rows in contents.items() if train and name != "train"},
            samples=tuple(_samples(own, splits, samples, processing)),
            max_length=None if processing is None else own.max_length,
            is_exact=all(each.measured is None or each.measured.is_exact for each in splits),
            decisions=tuple(decisions),
            error=_error(own, splits),
        )


def _data(data: Data, val: Data | None, image_root: PathLike | None) -> MMDataModule:
    if isinstance(data, MMDataModule):
        return data.without_limits()
    given = {"train": data, "val": val, "image_root": image_root}
    options: dict[str, Any] = {name: str(each) if isinstance(each, Path) else each for name, each in given.items()}
    return MMDataModule(**options).without_limits()


def _processing(model: ModelLike | None, data: MMDataModule) -> ModelProcessor | None:
    """The processor of the model, or else the data module's own."""
    if model is None and not data.processor:
        log_decision("check", "reading only", "no model is named, so that no row is tokenized")
        return None
    if model is not None:
        data.processor = _model_processor(model)
    return data.processing


def _model_processor(model: ModelLike) -> ModelProcessor:
    if isinstance(model, MMModule):
        return model.processing
    source = ModelSource.of(model)
    if source.loaded is not None:
        return source.loaded.required_processor
    if source.backbone is None:
        raise UserError(f"{model} is a run.", "Data is checked before one.", "Name the model that it trains.")
    return load_processor(source.backbone.path, source.backbone.revision)


def _check_split(data: MMDataModule, name: str, processing: ModelProcessor | None) -> _CheckedSplit:
    split = data.rows.split(name)
    unread = tuple(each for each in data.rejected_samples if each.split == name)
    if processing is None or not len(split.samples):
        return _CheckedSplit(name, split, None, unread)
    measured = measure_rows(split.samples, processing, data.row_meter, num_processes())
    return _CheckedSplit(name, split, measured, (*unread, *measured.rejections))


def _sources(checked: _CheckedSplit) -> list[CheckedSource]:
    """What was found of each source of a split."""
    samples = checked.split.samples
    of_rows = np.array(samples.sources)[samples.source_of_rows()]
    used = np.ones(len(samples), bool) if checked.measured is None else checked.measured.used
    found = []
    split = checked.split
    for source, table, usable, kept in zip(split.sources, split.tables, split.num_usable, split.num_used, strict=True):
        rows = of_rows == table.name
        its_own = [each for each in checked.rejections if each.source in (source.path, table.name)]
        dropped = [each for each in its_own if each.kind == "dropped"]
        if usable > kept:  # no fault of the rows, and no part of max_bad_fraction
            bounds = {"first": source.first, "limit": source.limit, "sampling": source.sampling}
            limit = f"{_BEYOND}: {', '.join(f'{name} {given}' for name, given in bounds.items() if given is not None)}"
            dropped += [Rejection(table.name, limit)] * (usable - kept)
        found.append(
            CheckedSource(
                split=checked.name,
                name=table.name,
                path=source.path,
                shape=table.shape,
                read=table.num_read,
                used=int(used[rows].sum()),
                cut=len({each.origin for each in its_own if each.kind == "cut"}),
                reasons=dict(Counter(map(_category, dropped)).most_common()),
                examples={_category(each): f"{each.origin}: {each.reason}" for each in reversed(dropped)},
                ignored=table.ignored,
                lengths=_lengths(checked.measured, rows),
            )
        )
    return found


def _category(rejection: Rejection) -> str:
    return rejection.reason.partition(":")[0]


def _lengths(measured: MeasuredRows | None, rows: NDArray[np.bool_] | None = None) -> Lengths | None:
    """Lengths of all rows, or of these ones, that were tokenized; None where none was."""
    if measured is None:
        return None
    known = measured.tokens[:, 0] >= 0
    chosen = known if rows is None else known & rows
    if not chosen.any():
        return None
    tokens = {kind: _spread(measured.tokens[chosen, column]) for column, kind in enumerate(KINDS)}
    return Lengths(tokens, int(chosen.sum()), measured.cut[chosen].mean(), measured.too_long[chosen].mean())


def _spread(values: NDArray[np.int64]) -> dict[str, float]:
    levels = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {name: float(np.quantile(values, level)) for name, level in levels.items()}


def _samples(
    data: MMDataModule, splits: Sequence[_CheckedSplit], count: int, processing: ModelProcessor | None
) -> list[CheckedSample]:
    """Rows of each source, evenly spaced over those that are used, with their decoded pictures."""
    if processing is None:
        return []
    meter = data.row_meter(processing)
    found = []
    for checked in splits:
        if checked.measured is None:
            continue
        samples = checked.split.samples
        of_rows = samples.source_of_rows()
        for number, name in enumerate(samples.sources):
            rows = np.flatnonzero((of_rows == number) & checked.measured.used)
            chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]
            shown = [meter.show(samples[int(index)]) for index in chosen]
            found += [CheckedSample(checked.name, name, row) for row in shown if row is not None]
    return found


def _error(data: MMDataModule, splits: Sequence[_CheckedSplit]) -> UserError | None:
    """Why a fit stops on this data; None where it does not."""
    for checked in splits:
        rejected = RejectedSamples(data.rejected_samples.max_bad_fraction)
        rejected.add(checked.rejections, checked.name)
        rejected.num_rows[checked.name] = sum(table.num_read for table in checked.split.tables)
        try:
            refuse_losses(checked.name, checked.split, rejected, data.reading)
        except UserError as error:
            return error
    return None
