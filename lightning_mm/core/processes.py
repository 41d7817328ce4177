"""Jobs in worker processes, with a progress bar.

The workers are those of a torch DataLoader: they are forked, end with the process that made them, however it ends, and
tell when one of them was killed.

Data flow: a function and the arguments of each call -> worker processes, or this one -> what the calls return.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lightning_mm.core.errors import UserError


def num_processes() -> int:
    """Number of processes that this one may run at the same time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_in_processes(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], num_workers: int, what: str
) -> list[Any]:
    """Call a function once per job, in worker processes where there are several jobs.

    Args:
        function: The workers inherit it with all that it holds; what it changes there is lost.
        jobs: Arguments of each call.
        num_workers: Number of processes; 0 and 1 call it in this one.
        what: Name of the progress bar.

    Returns:
        What each call returned, in the order of the jobs.

    Raises:
        UserError: A call raised it, or a worker was killed.
    """
    workers = min(num_workers, len(jobs)) if min(num_workers, len(jobs)) > 1 else 0
    loader = DataLoader(
        _Calls(function, jobs),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_begin if workers else None,
        generator=torch.Generator(),  # not the global one, which a run's own randomness comes from
    )
    results = []
    with progress(what, len(jobs)) as advance:
        try:
            for result in loader:
                if isinstance(result, UserError):
                    raise result
                results.append(result)
                advance()
        except RuntimeError as error:
            if (killed := worker_killed_error(error)) is None:
                raise
            raise killed from error
    return results


def worker_killed_error(error: RuntimeError) -> UserError | None:
    """The UserError for a killed worker, or None; torch may raise it anywhere, not only in a loader."""
    if not str(error).startswith("DataLoader worker"):
        return None
    return UserError(
        "A data worker was killed.",
        f"{error} Most often the machine ran out of memory, or of shared memory (/dev/shm).",
        "Lower data.num_workers or data.batch_size; in a container, raise --shm-size.",
    )


class _Calls(Dataset[Any]):
    """Calls as a dataset; a UserError is returned, since torch would reduce it to text."""

    def __init__(self, function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> None:
        self._function, self._jobs = function, jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._function(*self._jobs[index])
        except UserError as error:
            return error


def _unchanged(result: Any) -> Any:
    return result


_PR_SET_PDEATHSIG = 1


def _begin(worker: int) -> None:
    if sys.platform == "linux":  # torch's workers notice the end of their parent only between two calls
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Threads of the tokenizers do not outlive a fork, and would be waited for.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar of jobs, shown on a terminal if they take more than a moment.

    Args:
        what: Its name.
        total: Number of jobs.
    """
    with tqdm(total=total, desc=what, delay=1.0, disable=None, leave=False) as bar:
        yield lambda: bar.update() and None
