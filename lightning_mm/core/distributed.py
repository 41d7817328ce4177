"""Ranks of a distributed run: who we are, what the others hold, and failures that all ranks hear of.

Data flow: a Python object of this rank -> collectives of ``torch.distributed`` -> the objects of all ranks. Without a
process group every function behaves as in a run of one rank.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from lightning_mm.core.errors import UserError

Made = TypeVar("Made")


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def all_gather_object(value: Any) -> list[Any]:
    """The value of every rank in the order of ranks, on every rank."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    distributed.all_gather_object(values, value)
    return values


def gather_object(value: Any) -> list[Any] | None:
    """The value of every rank in the order of ranks, on rank 0; None on the others."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    values: list[Any] | None = [None] * world_size if rank == 0 else None
    distributed.gather_object(value, values)
    return values


def run_on_all_ranks(attempt: Callable[[], Made]) -> tuple[Made | None, UserError | str]:
    """Call a function on every rank; if any of them fails, all return that failure and none is left waiting.

    Args:
        attempt: May contain collectives, if what can fail comes before or after them.

    Returns:
        The function's result (None where a rank failed), and the failure of the lowest rank that has one; '' if none.
    """
    made: Made | None = None
    failure: UserError | str = ""
    try:
        made = attempt()
    except UserError as error:
        failure = error
    except Exception as error:  # whatever it is, the other ranks must hear of it
        failure = f"{type(error).__name__}: {error}"
    failure = next((each for each in all_gather_object(failure) if each), "")
    return (None if failure else made), failure
