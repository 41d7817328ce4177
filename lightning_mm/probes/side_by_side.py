"""Blocks of layers worked on side by side: one thread for each core, none within an operation.

Data flow: ``protocol`` hands over what is to be done with a block of layers and gets the results in order.

Probing is a long chain of small operations. Shared among cores, each of them waits for the slowest core, for ever where
another process has it; kept to one core each, blocks wait for nobody, and results do not depend on the number of cores.

Shapes: L layers.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_LAYERS = 8
"""More at once bring nothing but memory."""

Result = TypeVar("Result")


def by_layers(work: Callable[[slice], Result], num_layers: int, device: torch.device) -> list[Result]:
    """What ``work`` makes of each block of layers, in order; a GPU does them one after the other.

    Example:
        >>> by_layers(lambda layers: layers.start, 20, torch.device("cuda"))
        [0, 8, 16]
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    size = max(1, min(_LAYERS, math.ceil(num_layers / threads)))
    blocks = [slice(start, start + size) for start in range(0, num_layers, size)]
    if device.type != "cpu":
        return [work(block) for block in blocks]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, blocks))
    finally:
        torch.set_num_threads(threads)
