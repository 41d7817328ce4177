"""Runs in processes of their own that kill themselves at a storage event or are killed after a time; and what differs.

A process is forked from one that has imported everything, so that a start costs no import. It must not have computed
anything before, for threads do not survive a fork.

Data flow: arguments + ``Kill`` -> process -> ``Finished``; folders of two runs -> ``differences``.
"""

import contextlib
import csv
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "sqlite3.connect")
_TIMED = ("seconds", "per_second", "wait", "memory", "mfu", "tokens", "cost", "inspect/share")
"""Parts of names of values that a clock or the operating system has measured."""
_OF_THE_PROCESS = {
    "run.json": "when it began",
    "report.html": "made of the files that are compared, with times",
    "decisions.json": "says also that a run goes on",
    "hyperparameters.json": "says also what it goes on from",
    "config.yaml": "holds what it goes on from",
}
"""Files that are not compared, and what in them is of the process and not of the run."""


@dataclass(frozen=True)
class Kill:
    """When a process is killed.

    Args:
        event: At its n-th write to storage, from 1; None: not at one.
        after: After so many seconds; None: not after a time.
    """

    event: int | None = None
    after: float | None = None


@dataclass(frozen=True)
class Finished:
    """A process that has ended.

    Args:
        status: Exit status; -9 if it was killed.
        seconds: How long it took.
        events: Number of its writes to storage, as far as it came.
        log: What it printed.
    """

    status: int
    seconds: float
    events: int
    log: Path


def run_fit(arguments: list[str], folder: Path, kill: Kill | None, *, other_disk: bool = False) -> Finished:
    """Run the command line in a process of its own, with its cache and its runs in a folder.

    Args:
        arguments: Of ``lightning-mm``.
        folder: Working folder, made where missing.
        kill: When it is killed; None: it is not.
        other_disk: Whether temporary files lie in memory, which is another file system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, counter = folder / f"log-{len(list(folder.glob('log-*')))}.txt", folder / "events"
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        _run(arguments, folder, log, counter, kill, other_disk)
    if kill is not None and kill.after is not None:
        while (
            time.perf_counter() - began < kill.after
            and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):  # workers of the loader
        os.killpg(child, signal.SIGKILL)
    events = int(counter.read_text()) if counter.is_file() else 0
    return Finished(os.waitstatus_to_exitcode(status), time.perf_counter() - began, events, log)


def _run(arguments: list[str], folder: Path, log: Path, counter: Path, kill: Kill | None, other_disk: bool) -> None:
    """The child: never returns."""
    os.setsid()
    os.chdir(folder)
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    if other_disk and Path("/dev/shm").is_dir():
        os.environ["TMPDIR"] = "/dev/shm"
    status, seen = 1, 0

    def count(event: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in _WRITES or not _writes(event, given, folder):
            return
        seen += 1
        if kill is not None and seen == kill.event:
            os.killpg(0, signal.SIGKILL)

    try:
        from lightning_mm.__main__ import main

        sys.addaudithook(count)
        status = main(arguments)
    except SystemExit as end:
        status = int(end.code or 0) if isinstance(end.code, int | None) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        total = seen
        counter.write_text(str(total))
        sys.stdout.flush()
        os._exit(status)


def _writes(event: str, given: tuple[Any, ...], folder: Path) -> bool:
    """Whether an audited event changes something in the folder."""
    path = given[0] if given else None
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    if event == "open" and not (given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        return False
    return str(folder) in os.path.abspath(os.fsdecode(path))


def differences(whole: Path, other: Path) -> list[str]:
    """What a run has left otherwise than another: files, and values in them.

    Args:
        whole: Folder of the uninterrupted run.
        other: Folder of the run that was killed.
    """
    names = {str(path.relative_to(root)) for root in (whole, other) for path in root.rglob("*") if path.is_file()}
    found = []
    for name in sorted(names - _OF_THE_PROCESS.keys()):
        one, two = whole / name, other / name
        if not (one.is_file() and two.is_file()):
            found.append(f"{name}: only in the {'killed' if two.is_file() else 'uninterrupted'} run")
            continue
        contents = (_anywhere(_content(path), root) for path, root in ((one, whole), (two, other)))
        if (place := next(_unequal(*contents), None)) is not None:
            found.append(f"{name}: {place}")
    return found


def _content(path: Path) -> Any:
    """What a file says, without what a clock has measured."""
    if path.suffix == ".ckpt":
        saved = torch.load(path, weights_only=True)
        for state in saved.get("callbacks", {}).values():  # seconds of training and of looks
            for name in ("training", "spent"):
                state.pop(name, None)
        return {**saved, "loops": _without_totals(saved.get("loops"))}
    if path.name == "inspections.json":
        return [
            {k: v for k, v in _without_times(each).items() if k != "share"} for each in json.loads(path.read_text())
        ]
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = [{k: v for k, v in row.items() if v and not _is_timed(k)} for row in csv.DictReader(file)]
        return [row for row in rows if row.keys() - {"step", "epoch"}]
    if path.suffix == ".json":
        return _without_times(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_without_times(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes()


def _anywhere(value: Any, root: Path) -> Any:
    """A value without the place of its run."""
    if isinstance(value, str):
        return value.replace(str(root), "RUN")
    if isinstance(value, dict):
        return {_anywhere(key, root): _anywhere(each, root) for key, each in value.items()}
    return [_anywhere(each, root) for each in value] if isinstance(value, list | tuple) else value


def _without_totals(value: Any) -> Any:
    """Lightning's state of its loops without what it counts over all attempts, those that a kill undid included.

    Nor what it counts of hooks that have returned: the checkpoint is saved in one of them, or by the run that goes on.
    """
    if isinstance(value, dict):
        return {key: _without_totals(each) for key, each in value.items() if key not in ("total", "completed")}
    return value


def _is_timed(name: str) -> bool:
    return any(part in name for part in _TIMED)


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(each) for key, each in value.items() if not _is_timed(str(key))}
    return [_without_times(each) for each in value] if isinstance(value, list | tuple) else value


def _unequal(one: Any, two: Any, place: str = "") -> Iterator[str]:
    """Places where two contents differ."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.shape != two.shape or not torch.equal(one, two):
            yield place
    elif isinstance(one, dict) and isinstance(two, dict):
        for key in one.keys() | two.keys():
            if key not in one or key not in two:
                yield f"{place}.{key} in one only"
            else:
                yield from _unequal(one[key], two[key], f"{place}.{key}")
    elif isinstance(one, list) and isinstance(two, list):
        if len(one) != len(two):
            yield f"{place}: {len(one)} and {len(two)} entries"
        for number, pair in enumerate(zip(one, two, strict=False)):
            yield from _unequal(*pair, f"{place}[{number}]")
    elif one != two and not (one != one and two != two):  # NaN equals NaN here
        yield f"{place}: {str(one)[:60]} and {str(two)[:60]}"
