"""One look inside the model for all callbacks that are due: one forward pass, one clock, one place to write to.

Data flow: due step -> ``reader`` on every rank -> rank 0: each due callback's analysis -> layers.csv, matrices.json,
inspections.json, the loggers. Training is as if nothing had happened, also where any of it fails.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from lightning_mm.analysis.findings import Findings, FindingsWriter
from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.analysis.summary import summary_metrics
from lightning_mm.callbacks.reader import Reader
from lightning_mm.callbacks.schedule import Budget, Schedule
from lightning_mm.core import metric_names
from lightning_mm.core.decisions import log, log_decision
from lightning_mm.core.distributed import all_gather_object
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.geometry.representations import one_thread
from lightning_mm.report.wandb import OnlineLogger
from lightning_mm.training.eval_context import data_of, live

Made = TypeVar("Made")


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
    reading: HiddenStates
    start: HiddenStates | None
    text_only: HiddenStates | None
    device: torch.device


class Looker(Protocol):
    """A callback that looks inside."""

    schedule: Schedule

    def analyse(self, look: Look) -> Findings: ...

    def wants_text_only(self, outermost: bool) -> bool: ...


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
        self.recorder = FindingsWriter(run)
        self.probe_set = data_of(trainer).probe_set()
        self.reader = Reader(trainer, module, self.probe_set)
        self.total = int(trainer.estimated_stepping_batches)
        self.due = {looker: looker.schedule.steps(self.total) for looker in lookers}
        self.start: HiddenStates | None = None
        self._seen = trainer.global_step
        self._running_since: float | None = None

    def at_start(self) -> None:
        """Before the first step of a new run; a resumed one is told where it came from."""
        step = self.trainer.global_step
        if self.trainer.is_global_zero:
            attempted(lambda: self.recorder.write_probe_set(self.probe_set), "writing down the probe set", step, [])
            if step:
                earlier = partial(self.recorder.load_start, self.probe_set)
                self.start = attempted(earlier, "taking up the first reading", step, [])
        if not step:
            self._look([looker for looker, due in self.due.items() if 0 in due], last=False)

    @property
    def training_seconds(self) -> float:
        """So far, the stretch that runs included."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return self.budget.training + running

    def resume_clock(self) -> None:
        """Training goes on."""
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def pause_clock(self) -> None:
        """What comes now is not training."""
        self.budget.training, self._running_since = self.training_seconds, None

    def after_batch(self) -> None:
        """Look, if the optimizer has just made a step after which somebody is due, and time allows."""
        step = self.trainer.global_step
        if step == self._seen or step >= self.total:
            return
        self._seen = step
        self._look(self._affordable([looker for looker, due in self.due.items() if step in due], step), last=False)

    def at_end(self) -> None:
        """After the last step, whichever that was."""
        self._look([looker for looker in self.lookers if looker.schedule.end], last=True)
        if self.budget.count:
            spent, share = f"{self.budget.spent:.1f} s in {self.budget.count} looks", self.budget.share()
            log.info("inspection: %s, %.1f%% of %.0f s of training", spent, 100 * share, self.budget.training)

    def _affordable(self, due: list[Looker], step: int) -> list[Looker]:
        """Those whose own budget allows it. Rank 0's clock counts: all ranks look, or none."""
        if not due:
            return due
        self.pause_clock()
        kept = int(any(looker.schedule.end for looker in self.lookers))
        fits = [self.budget.affords(looker.schedule.budget, step, self.total, kept) for looker in due]
        fits = all_gather_object(fits)[0]
        if left := [looker for looker, fit in zip(due, fits, strict=True) if not fit]:
            who = f" of {', '.join(type(looker).__name__ for looker in left)}" if any(fits) else ""
            share = " or ".join(sorted({f"{looker.schedule.budget:.0%}" for looker in left}))
            cost = f"one takes {self.budget.spent / self.budget.count:.1f} s"
            reason = f"{cost}, and all may take {share} of the training time (schedule.budget)"
            log_decision("inspection.schedule", f"no look{who} at step {step}", reason)
        return [looker for looker, fit in zip(due, fits, strict=True) if fit]

    def _look(self, due: Sequence[Looker], last: bool) -> None:
        if not due:
            return
        self.pause_clock()
        if self.module.device.type == "cuda":
            torch.cuda.synchronize()
        began, step = time.perf_counter(), self.trainer.global_step
        reading, problem = self.reader.read()
        problems = [f"nothing was read at step {step}: {problem}"] if problem else []
        text_only = None
        if not problem and any(looker.wants_text_only(last or step == min(self.due[looker])) for looker in due):
            text_only, alone = self.reader.read_without_pictures()
            problems += [f"nothing was read without pictures at step {step}: {alone}"] if alone else []
        forward = time.perf_counter() - began
        for told in problems:
            log.warning("inspection: %s; training goes on", told)
        if self.trainer.is_global_zero:
            found = Findings(step, problems=problems)
            tell = partial(self._tell, found, due, reading, text_only, forward, began)
            attempted(tell, "looking inside", step, problems)
        self.budget.spent += time.perf_counter() - began
        self.budget.count += 1

    def _tell(
        self,
        found: Findings,
        due: Sequence[Looker],
        reading: HiddenStates | None,
        text_only: HiddenStates | None,
        forward: float,
        began: float,
    ) -> None:
        """Rank 0: analyse, write down, log; each attempted by itself, so that what can be had is had."""
        if reading is not None:
            self._analyse(found, due, reading, text_only)
        seconds = time.perf_counter() - began
        share = self.budget.share(seconds)
        summary = partial(summary_metrics, found, live(self.module).plan.layers)
        values = attempted(summary, "summing up", found.step, found.problems) or {}
        values |= {metric_names.INSPECTION_SECONDS: seconds}
        if self.budget.training:
            values |= {metric_names.INSPECTION_SHARE: share}
        for logger in self.trainer.loggers:
            attempted(partial(_log, logger, values, found), type(logger).__name__, found.step, found.problems)
        writing = partial(self.recorder.write, found, forward, seconds - forward, share)
        attempted(writing, "writing down what was found", found.step, found.problems)

    def _analyse(
        self, found: Findings, due: Sequence[Looker], reading: HiddenStates, text_only: HiddenStates | None
    ) -> None:
        found.problems += [*reading.problems, *(text_only.problems if text_only else ())]
        if found.step == 0:
            self.start = reading
            keep = partial(self.recorder.save_start, reading, self.probe_set)
            attempted(keep, "keeping the first reading", 0, found.problems)
        look = Look(reading.step, self.probe_set, reading, self.start, text_only, self.module.device)
        for looker in due:
            with one_thread():  # data workers hold the other cores, and threads that wait for one spin
                part = attempted(partial(looker.analyse, look), type(looker).__name__, look.step, found.problems)
            if part is not None:
                found.extend(part)


def attempted(attempt: Callable[[], Made], what: str, step: int, problems: list[str]) -> Made | None:
    """What is made, or None and one problem more: a fault in looking never stops what is looked at."""
    try:
        return attempt()
    except Exception as error:
        problems.append(f"{what} failed at step {step}: {type(error).__name__}: {error}")
        log.warning("%s; training goes on", problems[-1])
        return None


def _log(logger: Logger, values: dict[str, float], found: Findings) -> None:
    logger.log_metrics(values, step=found.step)
    if isinstance(logger, OnlineLogger):
        logger.log_layers(found.rows)


def restored_budget(saved: dict[str, Any]) -> Budget:
    """The budget of a resumed run."""
    return Budget(float(saved["spent"]), int(saved["count"]), float(saved["training"]))
