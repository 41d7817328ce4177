"""Steps whose loss or gradient is not finite: examined, left as a file to replay, and passed over or refused.

Data flow: micro-batches of a window -> loss and gradient norm, reduced over ranks, so that all ranks decide alike -> if
not finite: each rank runs its micro-batches again (``execution.nonfinite``) -> what all found ->
``nonfinite/step-N.json`` of the run (rows that the readers read, and what was found) -> no gradient, so that the
optimizer changes nothing; or ``last.ckpt`` and an error.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_mm.core.decisions import log, log_decision
from lightning_mm.core.distributed import all_gather_object, rank_and_world_size
from lightning_mm.core.errors import UserError, first_line
from lightning_mm.core.io import write_json
from lightning_mm.core.random_state import restore_rng
from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.sample import Sample
from lightning_mm.data.written_rows import row_of_sample
from lightning_mm.execution.loss import LossOutput
from lightning_mm.execution.nonfinite import NonFiniteSource, find_nonfinite
from lightning_mm.models.side_effects import restoring_state
from lightning_mm.training.callbacks.checkpoints import LastCheckpoint
from lightning_mm.training.callbacks.run_recorder import RunRecorder

if TYPE_CHECKING:
    from lightning_mm.training.module import MMModule

Kind = TypeVar("Kind", bound=Callback)
_SHOWN = 4
"""Rows that a message names."""


@dataclass(frozen=True)
class MicroBatch:
    """What is kept of a micro-batch until the optimizer step.

    Args:
        samples: Its rows; it is made again from them.
        nll: () its summed loss, on the device.
        batch: The last one of a user's own loader, which cannot be made again; else None.
    """

    samples: tuple[Sample, ...]
    nll: Tensor
    batch: Batch | None


@dataclass(frozen=True)
class RankFindings:
    """What one rank found in its micro-batches.

    Args:
        place: The micro-batch at fault, in words; '' where each is finite by itself.
        what: Where NaN or infinity comes from, in words.
        rows: Places in the data of the rows at fault.
        samples: The rows of the micro-batches at fault.
        batch_size: Rows of the largest of them.
    """

    place: str = ""
    what: str = ""
    rows: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = field(default=(), repr=False)
    batch_size: int = 1


class NonFiniteStepError(UserError):
    """A step that stops the run.

    Args:
        error: The message.
        cause: Where NaN or infinity comes from, with the rows, in a sentence part.
    """

    def __init__(self, error: UserError, cause: str) -> None:
        super().__init__(error.what, error.why, error.fix)
        self.cause = cause


class NonFiniteSteps:
    """Watches the optimizer steps of a fit.

    Args:
        passed: Steps that were passed over so far; checkpoints keep it.
    """

    def __init__(self, passed: int = 0) -> None:
        self.passed = passed
        self._window: list[MicroBatch] = []

    def add(self, batch: Batch, objective: LossOutput, can_be_made_again: bool) -> None:
        """Keep what is needed of a micro-batch, without synchronizing with the device."""
        if not can_be_made_again and self._window:
            last = self._window[-1]
            self._window[-1] = MicroBatch(last.samples, last.nll, None)
        self._window.append(MicroBatch(batch.samples, objective.nll.detach(), None if can_be_made_again else batch))

    def close(self, module: "MMModule", loss: float, norm: Tensor) -> bool:
        """End a window before the optimizer step: whether it can be done; if it is passed over, gradients are gone.

        A collective call: loss and norm are those of all ranks.

        Args:
            module: The module in training.
            loss: Mean loss of the step.
            norm: () norm of its gradient.

        Raises:
            NonFiniteStepError: They are not finite, and ``module.skip_nonfinite`` steps have been passed over.
        """
        window, self._window = self._window, []
        if math.isfinite(loss) and bool(norm.isfinite()):
            return True
        for parameter in module.trainable.values():  # an optimizer passes over what has no gradient
            parameter.grad = None
        step = module.trainer.global_step + 1
        found = _gather(_examine(module, window), window)
        fault = {"step": step, "loss": str(loss), "gradient_norm": str(norm.item()), **_described(found)}
        file = _write(module, fault, found)
        what = "loss" if not math.isfinite(loss) else "gradient"
        if self.passed >= module.skip_nonfinite:
            raise _error(module, what, fault, file, self.passed)
        self.passed += 1
        log_decision(
            "model.skip_nonfinite",
            f"step {step} is passed over, {self.passed} of at most {module.skip_nonfinite}",
            f"its {what} is not finite: {_because(fault)}{f'; {file}' if file else ''}",
        )
        return False


def _examine(module: "MMModule", window: list[MicroBatch]) -> RankFindings:
    """Run the micro-batches of this rank again, with the random numbers of the step, up to the first one at fault."""
    lost = [number for number, each in enumerate(window) if not bool(each.nll.isfinite())]
    number, source = (lost or [0])[0], None
    trainable = {name: each for name, each in module.mm.model.named_parameters() if each.requires_grad}
    try:
        with restoring_state(module), module.trainer.precision_plugin.forward_context():
            restore_rng(module.resume_point.rng)
            for number, each in enumerate(window):
                if (batch := _made_again(module, each)) is not None:
                    source = find_nonfinite(module.mm.model, batch, module.objective, trainable)
                if source is not None or number in lost[:1]:
                    break
    except Exception as error:  # of any kind: the other ranks wait for what this one reports
        source = NonFiniteSource(f"not known, since the batch could not be run again: {first_line(error)}", "")
    if source is None and lost:
        source = NonFiniteSource("not known: it is finite when it is run again", "")
    if source is None:
        return RankFindings()
    bad = [window[each] for each in lost] or [window[number]]
    named = [window[number].samples[row] for row in source.rows] or [row for each in bad for row in each.samples]
    rank, world_size = rank_and_world_size()
    places = [f"micro-batch {number + 1} of {len(window)}"] * (len(window) > 1) + [f"rank {rank}"] * (world_size > 1)
    return RankFindings(
        " of ".join(places) or "its batch",
        source.what,
        tuple(row.origin for row in named),
        tuple(row for each in bad for row in each.samples),
        max(len(each.samples) for each in bad),
    )


def _made_again(module: "MMModule", each: MicroBatch) -> Batch | None:
    data = _files(module)
    if data is None:
        return each.batch
    collate = module.wrap_collator(data.collator())
    batch: Batch = collate(list(each.samples))
    return batch.to(module.device)


def _gather(mine: RankFindings, window: list[MicroBatch]) -> list[RankFindings]:
    """What the ranks with a fault found; the rows of all ranks where none has one by itself."""
    found = [each for each in all_gather_object(mine) if each.place]
    if found:
        return found
    samples = tuple(row for each in window for row in each.samples)
    origins, size = tuple(row.origin for row in samples), max(len(each.samples) for each in window)
    why = "each micro-batch by itself is finite; their sum, or its norm, overflows"
    gathered: list[RankFindings] = all_gather_object(RankFindings("the step", why, origins, samples, size))
    return gathered


def _described(found: list[RankFindings]) -> dict[str, Any]:
    return {
        "first": found[0].what,
        "place": found[0].place,
        "rows_at_fault": [row for each in found for row in each.rows],
        "batch_size": max(each.batch_size for each in found),
    }


def _write(module: "MMModule", fault: dict[str, Any], found: list[RankFindings]) -> Path | None:
    """``nonfinite/step-N.json`` of the run; None where it has no folder or its rows are not known."""
    recorder = _callback(module, RunRecorder)
    if recorder is None or _files(module) is None:
        return None
    file = recorder.run.nonfinite / f"step-{fault['step']}.json"
    if module.trainer.is_global_zero:
        rows = [row_of_sample(row) for each in found for row in each.samples]
        try:
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"fault": fault, "rows": rows})
        except OSError as error:  # the other ranks go on
            log.warning("%s could not be written: %s", file, error)
    return file


def _error(module: "MMModule", what: str, fault: dict[str, Any], file: Path | None, passed: int) -> NonFiniteStepError:
    """The error of a step that stops the run, once the state before it is saved."""
    saver = _callback(module, LastCheckpoint)
    saved = None if saver is None else saver.save_before_step(module.trainer)
    kept = "the weights are as they were before it" + (f", in {saved}" if saved else "")
    earlier = f" {passed} steps were passed over before." if passed else ""
    replay = f"See where it comes from with `lightning-mm replay {file}`. " if file and saved else ""
    error = UserError(
        f"The {what} of step {fault['step']} is not finite.",
        f"I{_because(fault)[1:]}; {kept}.{earlier}",
        f"{replay}Mend or leave out such rows, lower model.optimizer.lr, use trainer.precision 32-true, or pass over "
        f"such steps with model.skip_nonfinite {passed + 1}.",
    )
    return NonFiniteStepError(error, f"{what} not finite: {_because(fault)}")


def _because(fault: dict[str, Any]) -> str:
    rows = fault["rows_at_fault"]
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"in {fault['place']} the first is {fault['first']}; rows {', '.join(rows[:_SHOWN])}{more}"


def _callback(module: "MMModule", kind: type[Kind]) -> Kind | None:
    callbacks: list[Callback] = module.trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
    return next((each for each in callbacks if isinstance(each, kind)), None)


def _files(module: "MMModule") -> MMDataModule | None:
    data = module.trainer.datamodule  # type: ignore[attr-defined]  # set by its connector
    return data if isinstance(data, MMDataModule) else None
