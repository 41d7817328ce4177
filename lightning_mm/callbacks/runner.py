"""Runs inspections for all callbacks that are due: one forward pass, one time budget, one writer.

Data flow: due step -> ``reader`` on every rank -> rank 0: each due callback's analysis -> layers.csv, matrices.json,
inspections.json, the loggers. Training is unaffected, also where any of it fails.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from lightning_mm.analysis.findings import Findings, FindingsWriter
from lightning_mm.analysis.hidden_states import HiddenStates
from lightning_mm.analysis.summary import summary_metrics
from lightning_mm.callbacks.reader import Reader
from lightning_mm.callbacks.schedule import Budget, Schedule
from lightning_mm.callbacks.subject import Loop, Subject
from lightning_mm.core import metric_names
from lightning_mm.core.decisions import log, log_decision
from lightning_mm.core.distributed import all_gather_object
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.geometry.representations import one_thread

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class InspectionInput:
    """Hidden states and context of one inspection, the input of ``LayerCallback.analyze``.

    Args:
        step: Optimizer steps done.
        probe_set: The rows that were read.
        reading: Hidden states of every layer now.
        start: Hidden states of every layer before the first step; None where they were not read.
        text_only: Hidden states of the entailment rows without their pictures; None where no callback asked for them.
        subject: The model itself, for analyses that run it; see ``Subject.evaluating``.
    """

    step: int
    probe_set: ProbeSet
    reading: HiddenStates
    start: HiddenStates | None
    text_only: HiddenStates | None
    subject: Subject

    @property
    def device(self) -> torch.device:
        """Device of the analyses."""
        return self.subject.device


class Inspector(Protocol):
    """What ``Inspection`` needs of a callback; see ``LayerCallback``."""

    schedule: Schedule

    def begin(self, subject: Subject, step: int) -> None: ...

    def analyze(self, data: InspectionInput) -> Findings: ...

    def wants_text_only(self, outermost: bool) -> bool: ...


class Inspection:
    """The inspections of one fit.

    Args:
        loop: The loop that trains.
        subject: What it trains.
        inspectors: All inspection callbacks, in their order.
        run: Run directory that findings are written to.
        budget: Seconds spent on inspections so far; updated in place.
    """

    def __init__(
        self, loop: Loop, subject: Subject, inspectors: Sequence[Inspector], run: RunDirectory, budget: Budget
    ) -> None:
        self.loop, self.subject, self.inspectors, self.budget = loop, subject, inspectors, budget
        self.recorder = FindingsWriter(run)
        self.probe_set = subject.probe_set
        self.reader = Reader(subject)
        self.total = loop.total
        self.due = {inspector: inspector.schedule.steps(self.total) for inspector in inspectors}
        self.start: HiddenStates | None = None
        self._seen = loop.step
        self._running_since: float | None = None

    def at_start(self) -> None:
        """Inspect before the first step of a new run; a resumed run loads that inspection's hidden states instead."""
        step = self.loop.step
        for inspector in self.inspectors:
            inspector.begin(self.subject, step)
        if self.loop.is_rank_zero:
            call_or_report(
                lambda: self.recorder.write_probe_set(self.probe_set), "writing down the probe set", step, []
            )
            if step:
                earlier = partial(self.recorder.load_start, self.probe_set)
                self.start = call_or_report(earlier, "taking up the first reading", step, [])
        if not step:
            self._inspect([inspector for inspector, due in self.due.items() if 0 in due], last=False)

    @property
    def training_seconds(self) -> float:
        """Seconds of training so far, including the stretch that is running."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return self.budget.training + running

    def resume_clock(self) -> None:
        """Start counting training time; no effect if it is counted already."""
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def pause_clock(self) -> None:
        """Stop counting training time."""
        self.budget.training, self._running_since = self.training_seconds, None

    def after_batch(self) -> None:
        """Inspect if the optimizer has just made a step after which a callback is due and the budget allows it."""
        step = self.loop.step
        if step == self._seen or (self.total is not None and step >= self.total):
            return
        self._seen = step
        self._inspect(
            self._affordable([inspector for inspector, due in self.due.items() if step in due], step), last=False
        )

    def at_end(self) -> None:
        """Inspect after the last step, and log the total time of all inspections."""
        self._inspect([inspector for inspector in self.inspectors if inspector.schedule.end], last=True)
        if self.budget.count and self.loop.is_rank_zero:
            spent, share = f"{self.budget.spent:.1f} s in {self.budget.count} looks", self.budget.share()
            log.info("inspection: %s, %.0f%% of %.1f s of training", spent, 100 * share, self.budget.training)

    def _affordable(self, due: list[Inspector], step: int) -> list[Inspector]:
        """The callbacks whose budget allows an inspection now, by rank 0's clock, so that all ranks agree."""
        if not due:
            return due
        self.pause_clock()
        kept = int(any(inspector.schedule.end for inspector in self.inspectors))
        total = self.total or step  # of a run without an end, what it has come to
        fits = [self.budget.affords(inspector.schedule.budget, step, total, kept) for inspector in due]
        fits = all_gather_object(fits)[0]
        if left := [inspector for inspector, fit in zip(due, fits, strict=True) if not fit]:
            who = f" of {', '.join(type(inspector).__name__ for inspector in left)}" if any(fits) else ""
            share = " or ".join(sorted({f"{inspector.schedule.budget:.0%}" for inspector in left}))
            cost = f"one takes {self.budget.spent / self.budget.count:.1f} s"
            reason = f"{cost}, and all may take {share} of the training time (schedule.budget)"
            log_decision("inspection.schedule", f"no look{who} at step {step}", reason)
        return [inspector for inspector, fit in zip(due, fits, strict=True) if fit]

    def _inspect(self, due: Sequence[Inspector], last: bool) -> None:
        if not due:
            return
        self.pause_clock()
        if self.subject.device.type == "cuda":
            torch.cuda.synchronize()
        began, step = time.perf_counter(), self.loop.step
        reading, problem = self.reader.read(step)
        problems = [f"nothing was read at step {step}: {problem}"] if problem else []
        text_only = None
        if not problem and any(inspector.wants_text_only(last or step in self.due[inspector][:1]) for inspector in due):
            text_only, alone = self.reader.read_without_pictures(step)
            problems += [f"nothing was read without pictures at step {step}: {alone}"] if alone else []
        forward = time.perf_counter() - began
        for problem in problems:
            log.warning("inspection: %s; training goes on", problem)
        if self.loop.is_rank_zero:
            found = Findings(step, problems=problems)
            analysis = partial(self._analyze_and_write, found, due, reading, text_only, forward, began)
            call_or_report(analysis, "looking inside", step, problems)
        self.budget.spent += time.perf_counter() - began
        self.budget.count += 1

    def _analyze_and_write(
        self,
        found: Findings,
        due: Sequence[Inspector],
        reading: HiddenStates | None,
        text_only: HiddenStates | None,
        forward: float,
        began: float,
    ) -> None:
        """Analyze, log and write on rank 0; a failure of one part does not keep the others from running."""
        if reading is not None:
            self._analyze(found, due, reading, text_only)
        seconds = time.perf_counter() - began
        share = self.budget.share(seconds)
        summary = partial(summary_metrics, found, self.subject.plan.layers)
        values = call_or_report(summary, "summing up", found.step, found.problems) or {}
        values |= {metric_names.INSPECTION_SECONDS: seconds}
        if self.budget.training:
            values |= {metric_names.INSPECTION_SHARE: share}
        for name, write in self.loop.loggers().items():
            call_or_report(partial(write, values, found), name, found.step, found.problems)
        writing = partial(self.recorder.write, found, forward, seconds - forward, share)
        call_or_report(writing, "writing down what was found", found.step, found.problems)

    def _analyze(
        self, found: Findings, due: Sequence[Inspector], reading: HiddenStates, text_only: HiddenStates | None
    ) -> None:
        found.problems += [*reading.problems, *(text_only.problems if text_only else ())]
        if found.step == 0:
            self.start = reading
            keep = partial(self.recorder.save_start, reading, self.probe_set)
            call_or_report(keep, "keeping the first reading", 0, found.problems)
        data = InspectionInput(reading.step, self.probe_set, reading, self.start, text_only, self.subject)
        for inspector in due:
            with one_thread():  # data workers hold the other cores, and threads that wait for one spin
                part = call_or_report(
                    partial(inspector.analyze, data), type(inspector).__name__, data.step, found.problems
                )
            if part is not None:
                found.extend(part)


def call_or_report(function: Callable[[], Result], what: str, step: int, problems: list[str]) -> Result | None:
    """The result of ``function``, or None if it raises: a failed inspection never stops training.

    Args:
        function: What is called, without arguments.
        what: Name of the call in the message.
        step: Optimizer steps done.
        problems: The message is appended here, and logged as a warning.
    """
    try:
        return function()
    except Exception as error:
        problems.append(f"{what} failed at step {step}: {type(error).__name__}: {error}")
        log.warning("%s; training goes on", problems[-1])
        return None


def restored_budget(saved: dict[str, Any]) -> Budget:
    """The budget of a resumed run, from ``LayerCallback.state_dict``."""
    return Budget(float(saved["spent"]), int(saved["count"]), float(saved["training"]))
