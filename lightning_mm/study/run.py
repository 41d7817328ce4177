"""Runs a study: every arm of every seed, in any number of sittings and processes.

Data flow: settings -> jobs in order (all arms of the first seed, then of the next) -> each is done by the process that
holds its lock -> results in the study's folder -> report.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_mm.core.decisions import log, log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json, write_json
from lightning_mm.study.folder import Job, StudyFolder
from lightning_mm.study.jobs import StudyJobs
from lightning_mm.study.settings import START, StudySettings, read_settings
from lightning_mm.verbs.result import open_decisions
from lightning_mm.verbs.rows import PathLike

_POLL = 5.0
"""Seconds between looks at what other processes have done."""


def run_study(
    settings: StudySettings | PathLike | Mapping[str, Any],
    out: PathLike,
    *,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    max_minutes: float | None = None,
    workers: int = 1,
    report: bool = True,
) -> StudyFolder:
    """Train and measure the arms of a study that are not measured yet; returns the study's folder.

    It can be stopped at any time and called again: complete jobs are kept, and a fit goes on from its last.ckpt.
    Several processes, on one machine or on several with a common folder, may work at one study.

    Args:
        settings: The study: a YAML file, the same as a dict, or ``StudySettings``.
        out: The study's folder.
        only: Arms to do; None: all.
        seeds: Seeds to do; None: all.
        max_minutes: No job is begun that would not end within so many minutes, by what like jobs took; None: no limit.
        workers: Processes that work at it; with several GPUs each has one of them.
        report: Whether study.md and study.html are written, of what is complete then.

    Raises:
        UserError: The folder belongs to another study, an arm or seed is not of this one, or a fit has failed.
    """
    study = read_settings(settings)
    folder = StudyFolder(Path(out).absolute())
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    with open_decisions():
        wanted = jobs_of(study, only, seeds)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.open(study)
        if workers > 1:
            _in_processes(folder, [job for job in wanted if not folder.is_complete(job)], workers, max_minutes)
        else:
            _work(StudyJobs(folder, study), wanted, deadline)
    if report and any(folder.is_complete(Job(START, seed)) for seed in study.seeds):
        from lightning_mm.study.report import write_study_report  # late, with altair

        log.info("report: %s", write_study_report(folder.path))
    return folder


def jobs_of(settings: StudySettings, only: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Job]:
    """The jobs in order: all of the first seed, then of the next; each seed begins with what its arms need.

    Args:
        settings: The study.
        only: Arms; None: all.
        seeds: Seeds; None: all.

    Raises:
        UserError: The study has no such arm or seed.
    """
    for what, asked, known in (("arm", only, [START, *settings.arms]), ("seed", seeds, settings.seeds)):
        for name in asked or ():
            if name not in known:
                raise UserError(
                    f"The study has no {what} {name}.", f"It has {', '.join(map(str, known))}.", "Name one."
                )
    arms = [name for name in settings.arms if only is None or name in only]
    chosen = [seed for seed in settings.seeds if seeds is None or seed in seeds]
    return [Job(arm, seed) for seed in chosen for arm in (START, *arms)]


def _work(jobs: StudyJobs, wanted: Sequence[Job], deadline: float | None) -> None:
    """Do what is not done and what nobody else does, until all is complete or time is up."""
    folder = jobs.folder
    while left := [job for job in wanted if not folder.is_complete(job)]:
        begun = 0
        for job in left:
            if job.arm != START and not folder.is_complete(Job(START, job.seed)):
                continue
            if not _fits(folder, job, deadline):
                log_decision("study", "stops here", f"{job} would not end in time; call it again to go on")
                return
            with _held(folder, job) as mine:
                if mine and not folder.is_complete(job):
                    jobs.do(job)
                    _note_seconds(folder, job)
                    begun += 1
        if not begun:
            time.sleep(_POLL)  # others work at what is left


@contextmanager
def _held(folder: StudyFolder, job: Job) -> Iterator[bool]:
    """Hold the lock of a job; gives False where another process has it."""
    file = folder.lock(job)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    _began[job] = time.monotonic()
    try:
        yield True
    finally:
        lock.release()


_began: dict[Job, float] = {}


def _note_seconds(folder: StudyFolder, job: Job) -> None:
    """Keep how long a job took, to tell whether the next one ends in time."""
    write_json(folder.of_job(job) / "seconds.json", time.monotonic() - _began.pop(job))


def _fits(folder: StudyFolder, job: Job, deadline: float | None) -> bool:
    """Whether a job should end before the deadline, by what the same arm took elsewhere, else by the longest job."""
    if deadline is None:
        return True
    left = deadline - time.monotonic()
    took = {
        Job(file.parent.name, int(file.parent.parent.name.removeprefix("seed"))): float(read_json(file))
        for file in folder.work.glob("seed*/*/seconds.json")
    }
    alike = [seconds for each, seconds in took.items() if each.arm == job.arm]
    expected = max(alike or took.values(), default=0.0)
    return left > expected


def _in_processes(folder: StudyFolder, wanted: Sequence[Job], workers: int, max_minutes: float | None) -> None:
    """Let several processes work at the study; each sees one GPU where there are several."""
    arms = list(dict.fromkeys(job.arm for job in wanted if job.arm != START))
    seeds = list(dict.fromkeys(job.seed for job in wanted))
    if not wanted:
        return
    command = [sys.executable, "-m", "lightning_mm", "study", "--out", str(folder.path)]
    command += ["--only", ",".join(arms), "--seeds", ",".join(map(str, seeds)), "--report", "false"]
    command += [] if max_minutes is None else ["--max_minutes", str(max_minutes)]
    gpus = _gpus()
    started = []
    for number in range(workers):
        environment = {**os.environ, "LIGHTNING_MM_STUDY_WORKER": str(number)}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        started.append(subprocess.Popen(command, env=environment))
    log.info("%d processes work at the study", workers)
    codes = [process.wait() for process in started]
    if any(codes):
        raise UserError(
            f"{sum(map(bool, codes))} of {workers} processes have failed.",
            "Their messages are above.",
            "Mend what they say, and call it again: complete arms are kept.",
        )


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]
