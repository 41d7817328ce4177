"""One look inside the model for all callbacks that are due: one forward pass, one clock, one place to write to.

Data flow: due step -> ``looking`` -> ``taps.read`` on every rank -> gathered on rank 0 -> each due callback's analysis
-> layers.csv, matrices.json, inspections.json, the loggers. Training is as if nothing had happened.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import lightning as L
import torch

from lightning_mm import state
from lightning_mm.analysis.findings import Findings
from lightning_mm.analysis.headline import scalars
from lightning_mm.analysis.record import Recorder
from lightning_mm.callbacks.live import data_of, live, looking
from lightning_mm.callbacks.schedule import Budget, Schedule
from lightning_mm.dashboards import names
from lightning_mm.dashboards.online import OnlineLogger
from lightning_mm.dashboards.rundir import RunDirectory
from lightning_mm.data.probe_sets import ProbeBatch, ProbeSet
from lightning_mm.decisions import decide, log
from lightning_mm.errors import UserError
from lightning_mm.geometry.threads import one_thread
from lightning_mm.taps.reading import Reading, gather, read
from lightning_mm.tuning.boundary import unchanged_slices

FAULTS = (
    RuntimeError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OSError,
    UserError,
)
"""What a failing analysis may raise; it is reported, and training goes on."""

_HELD_BYTES = 512 * 2**20
"""Encoded probe rows up to this size stay in memory; larger sets are encoded anew at every look."""


@dataclass(frozen=True, eq=False)
class Look:
    """What an analysis is given.

    Args:
        step: Optimizer steps done.
        probe_set: The rows that were read.
        reading: Every layer now.
        start: Every layer before the first step; None where it was not read.
        text_only: The entailment rows without their pictures, where some callback asked for them.
        device: Where to compute.
    """

    step: int
    probe_set: ProbeSet
    reading: Reading
    start: Reading | None
    text_only: Reading | None
    device: torch.device


class Looker(Protocol):
    """A callback that looks inside."""

    schedule: Schedule

    def analyse(self, look: Look) -> Findings: ...

    def wants_text_only(self, last: bool) -> bool: ...


class Inspection:
    """The looks of one fit.

    Args:
        trainer: The trainer.
        module: Its module.
        lookers: Every callback that looks inside.
        run: Where findings are written.
        budget: What looks have cost so far.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        lookers: Sequence[Looker],
        run: RunDirectory,
        budget: Budget,
    ) -> None:
        self.trainer, self.module, self.lookers, self.budget = trainer, module, lookers, budget
        self.recorder = Recorder(run)
        self.probe_set = data_of(trainer).probe_set()
        self.total = int(trainer.estimated_stepping_batches)
        self.due = [set(looker.schedule.steps(self.total)) for looker in lookers]
        self.start = self.recorder.start_reading(self.probe_set) if trainer.global_step else None
        self._mine: Reading | None = None
        self._batches: dict[str, list[ProbeBatch]] = {}
        self._seen = trainer.global_step
        self._running_since: float | None = None

    def at_start(self) -> None:
        """Before the first step of a new run."""
        if self.trainer.is_global_zero:
            self.recorder.probes(self.probe_set)
        if self.trainer.global_step == 0:
            self._look([looker for looker, due in zip(self.lookers, self.due, strict=True) if 0 in due], last=False)

    def resume_clock(self) -> None:
        """Training goes on."""
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def pause_clock(self) -> None:
        """What comes now is not training."""
        if self._running_since is not None:
            self.budget.training += time.perf_counter() - self._running_since
            self._running_since = None

    def after_batch(self) -> None:
        """Look, if the optimizer has just made a step after which somebody is due, and time allows."""
        step = self.trainer.global_step
        if step == self._seen or step >= self.total:
            return
        self._seen = step
        due = [looker for looker, steps in zip(self.lookers, self.due, strict=True) if step in steps]
        if due and self._affordable(due, step):
            self._look(due, last=False)

    def at_end(self) -> None:
        """After the last step, whichever that was."""
        ending = [looker for looker in self.lookers if looker.schedule.end]
        self._look(ending, last=True)
        if self.budget.count:
            spent, share = f"{self.budget.spent:.1f} s in {self.budget.count} looks", self.budget.share
            log.info("inspection: %s, %.1f%% of %.0f s of training", spent, 100 * share, self.budget.training)

    def _affordable(self, due: Sequence[Looker], step: int) -> bool:
        """Rank 0's clock counts: all ranks look, or none."""
        self.pause_clock()
        shares = [looker.schedule.budget for looker in due]
        share = None if None in shares else max(share for share in shares if share is not None)
        kept = sum(any(looker.schedule.end for looker in self.lookers) for _ in range(1))
        fits = state.gathered(self.budget.affords(share, step, self.total, kept))[0]
        if not fits:
            cost = self.budget.spent / self.budget.count
            decide(
                "inspection.schedule",
                f"no look at step {step}",
                f"one takes {cost:.1f} s, and all may take {share:.0%} of the training time (schedule.budget)",
            )
        return bool(fits)

    def _look(self, due: Sequence[Looker], last: bool) -> None:
        if not due:
            return
        self.pause_clock()
        if self.module.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        reading, problem = self._read(self.probe_set, "probes", keep=True)
        wanted = any(looker.wants_text_only(last or self.trainer.global_step == 0) for looker in due)
        text_only = None
        if wanted and not problem:
            text_only, problem = self._read(self.probe_set.without_pictures(), "text_only", keep=False)
        forward = time.perf_counter() - began
        if problem:
            log.warning("inspection: nothing was read at step %d: %s", self.trainer.global_step, problem)
        elif reading is not None:
            self._analyse(due, reading, text_only, forward, began)
        self.budget.spent += time.perf_counter() - began
        self.budget.count += 1

    def _read(self, probe_set: ProbeSet, name: str, keep: bool) -> tuple[Reading | None, str]:
        """Read on every rank; rank 0 gets all of it. A rank that fails tells the others instead of leaving them."""
        mine, problem = None, ""
        module = live(self.module)
        unchanged = unchanged_slices(module.plan) if keep else 0
        try:
            with looking(self.trainer, self.module):
                mine = read(
                    module.model,
                    module.anatomy,
                    self._encoded(probe_set, name),
                    self.module.device,
                    step=self.trainer.global_step,
                    before=self._mine if keep else None,
                    unchanged=unchanged,
                )
        except FAULTS as error:
            problem = f"{type(error).__name__}: {error}"
        problem = next((told for told in state.gathered(problem) if told), "")
        if problem or mine is None:
            return None, problem or "no rank has read anything"
        if keep and unchanged and self._mine is None:
            self._mine = mine
        data_of(self.trainer).ledger.add(mine.rejected)
        return gather(mine, probe_set), ""

    def _encoded(self, probe_set: ProbeSet, name: str) -> Iterable[ProbeBatch]:
        """This rank's batches; kept in memory where they are small, since encoding costs as much as reading."""
        if name in self._batches:
            return self._batches[name]
        batches = list(data_of(self.trainer).probe_loader(probe_set))
        if sum(t.nbytes for batch in batches for t in batch.inputs.values()) <= _HELD_BYTES:
            self._batches[name] = batches
        return batches

    def _analyse(
        self, due: Sequence[Looker], reading: Reading, text_only: Reading | None, forward: float, began: float
    ) -> None:
        if self.trainer.global_step == 0:
            self.start = reading
            self.recorder.keep_start(reading, self.probe_set)
        look = Look(reading.step, self.probe_set, reading, self.start, text_only, self.module.device)
        found = Findings(reading.step)
        for looker in due:
            part = attempted(lambda looker=looker: looker.analyse(look), type(looker).__name__, reading.step)  # type: ignore[misc]
            found.rows += part.rows
            found.matrices += part.matrices
            found.problems += part.problems
        seconds = time.perf_counter() - began
        self.recorder.write(found, forward, seconds - forward, self.budget.share)
        values = scalars(found, live(self.module).plan.layers)
        values |= {names.INSPECTION_SECONDS: seconds}
        if self.budget.training:
            values |= {names.INSPECTION_SHARE: (self.budget.spent + seconds) / self.budget.training}
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=reading.step)
            if isinstance(logger, OnlineLogger):
                logger.log_layers(found.rows)


def attempted(analyse: Callable[[], Findings], name: str, step: int) -> Findings:
    """What an analysis finds, or what went wrong in it: a fault in looking never stops what is looked at."""
    try:
        with one_thread():  # data workers hold the other cores, and threads that wait for one spin
            return analyse()
    except FAULTS as error:
        problem = f"{name} failed at step {step}: {type(error).__name__}: {error}"
        log.warning("%s; training goes on", problem)
        return Findings(step, problems=[problem])


def restored_budget(saved: dict[str, Any]) -> Budget:
    """The budget of a resumed run."""
    return Budget(float(saved["spent"]), int(saved["count"]), float(saved["training"]))
