"""Seeds of everything random in the order of the rows.

Data flow: ``data.seed`` and what the numbers are for (an epoch, a source) -> the seed of one generator.
"""

import hashlib

import torch
from torch import Tensor


def order_seed(*parts: int | str) -> int:
    """Seed of a generator; a hash, since with ``seed + epoch`` runs of other seeds would share orders.

    Args:
        parts: ``data.seed``, and the epoch or what else the generator is for.
    """
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "little")


def permutation(size: int, *parts: int | str) -> Tensor:
    """(size,) a random order of 0 to size - 1, from ``order_seed(*parts)``."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(order_seed(*parts)))
