"""Keeps LAPACK from waiting for a core that it does not get."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for what runs inside; the caller's number is back afterwards.

    A decomposition is thousands of short parallel regions, and each waits for all its threads. Two threads win nothing
    at these sizes, and where another process holds the second core (a data worker) they took 500 times as long for the
    eigenvalues of a 576 x 576 matrix (7 s, not 14 ms), and 15 times for its Cholesky factor.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
