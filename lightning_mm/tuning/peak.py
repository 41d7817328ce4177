"""How fast this device multiplies matrices: what the use that a run makes of it is measured against.

Data flow: device + dtype -> median over groups of square products, timed -> FLOP/s.
"""

import time
from collections import Counter
from statistics import median

import torch
from torch import nn

_SIZES = {"cpu": (1024,), "cuda": (8192, 4096, 2048)}
_GROUPS = 9


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of large matrix products under the settings in force (threads, TF32); random generators stay as they are.

    Args:
        device: Where to multiply.
        dtype: Of the factors.
        seconds: About how long to measure; a slow device takes longer.

    Raises:
        torch.OutOfMemoryError: Not even small matrices fit.
    """
    sizes = _SIZES.get(device.type, (4096, 2048))
    for size in sizes:
        try:
            return _timed(device, dtype, size, seconds)
        except torch.OutOfMemoryError:
            if size == sizes[-1]:
                raise
    raise AssertionError("every size either fits or raises")


def compute_dtype(model: nn.Module, precision: str) -> torch.dtype:
    """What the large products of a step are computed in.

    Args:
        model: As it trains.
        precision: The trainer's.
    """
    if precision == "bf16-mixed":
        return torch.bfloat16
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


def wait_for(device: torch.device) -> None:
    """Return when the device has done all it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def _timed(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    generator = torch.Generator(device).manual_seed(0)  # of constants, a GPU would be faster than of any real data
    a, b = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))
    out = torch.empty_like(a)

    def group(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b, out=out)
        wait_for(device)
        return (time.perf_counter() - began) / count

    group(1)  # kernels are loaded and chosen here
    count = max(1, round(seconds / (_GROUPS + 1) / group(1)))
    return 2 * size**3 / median(group(count) for _ in range(_GROUPS if count > 1 else 3))
