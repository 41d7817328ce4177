"""What devices can compute, and how long a step takes on one of them.

Data flow: a device's name, or matrix products timed here -> ``Device`` -> FLOPs and bytes of a step -> seconds. The
measured FLOP/s are also what a run's model FLOPs utilization (MFU) is a share of.
"""

import os
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch
from torch import nn

from lightning_mm.core.errors import UserError

_MATMUL_SIZES = {"cpu": (1024,), "cuda": (8192, 4096, 2048)}
_MATMUL_GROUPS = 9
_CPU_UTILIZATION = 0.65
_ADAMW_PASSES = 7
"""AdamW reads weight, gradient and two moments, and writes weight and moments."""


@dataclass(frozen=True)
class Device:
    """Peak rates of a device.

    Args:
        name: As shown.
        bf16: FLOP/s of dense bfloat16 products, summed in float32.
        fp32: FLOP/s of float32 products, without TF32.
        bandwidth: Bytes/s of its memory.
        memory: Bytes; 0 where it is not known.
        utilization: Share of the peak that a step is assumed to reach, norms and kernel launches included.
        is_cpu: Whether it is a CPU, where ``models.attention.cpu_kernels`` computes the attention of short rows.
    """

    name: str
    bf16: float
    fp32: float
    bandwidth: float
    memory: float
    utilization: float = 0.45
    is_cpu: bool = False

    def step_seconds(self, flops: float, trained_bytes: float, bf16: bool) -> float:
        """Predicted seconds of a step: products at the assumed utilization, then AdamW at the memory's bandwidth.

        Args:
            flops: Of the step.
            trained_bytes: Bytes of the weights that train.
            bf16: Whether products are of bfloat16; else of float32.
        """
        peak = self.bf16 if bf16 else self.fp32
        return flops / (peak * self.utilization) + _ADAMW_PASSES * trained_bytes / self.bandwidth


DEVICES = {
    # NVIDIA H200 data sheet, SXM: 1979 TFLOP/s bfloat16 with sparsity, half of it dense; 67 float32; 4.8 TB/s; 141 GB.
    "h200": Device("H200", 989e12, 67e12, 4.8e12, 141e9),
    # NVIDIA H100 data sheet, SXM: 1979 with sparsity; 67; 3.35 TB/s; 80 GB.
    "h100": Device("H100", 989e12, 67e12, 3.35e12, 80e9),
    # NVIDIA A100 data sheet, 80 GB SXM: 312 dense; 19.5; 2039 GB/s.
    "a100": Device("A100", 312e12, 19.5e12, 2.039e12, 80e9),
    # NVIDIA L40S data sheet: 362.05 dense; 91.6; 864 GB/s; 48 GB.
    "l40s": Device("L40S", 362e12, 91.6e12, 864e9, 48e9),
    # NVIDIA Ada architecture whitepaper, RTX 4090: 165.2 dense with float32 sums; 82.6; 1008 GB/s; 24 GB.
    "rtx4090": Device("RTX 4090", 165e12, 82.6e12, 1.008e12, 24e9),
}


def find_device(name: str, bf16: bool) -> Device:
    """A device by name.

    Args:
        name: Key of ``DEVICES``; 'cpu' is this machine's, by its number of cores; 'measured' times products here, on
            the GPU where there is one.
        bf16: Whether 'measured' times bfloat16 products; else float32.

    Raises:
        UserError: There is no device of that name.
    """
    plain = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    if plain in DEVICES:
        return DEVICES[plain]
    if plain == "cpu":
        # Two fused multiply-adds of 8 float32 numbers a cycle (AVX2) at 2.5 GHz; two channels of DDR4-3200, halved.
        cores = os.cpu_count() or 1
        return Device(f"CPU, {cores} cores", 80e9 * cores, 80e9 * cores, 25e9, 0, _CPU_UTILIZATION, is_cpu=True)
    if plain == "measured":
        return _measure_local_device(bf16)
    raise UserError(
        f"--device {name} is not known.", "It is in no table.", f"Use {', '.join(DEVICES)}, cpu or measured."
    )


def _measure_local_device(bf16: bool) -> Device:
    local = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = benchmark_matmul(local, torch.bfloat16 if bf16 else torch.float32)
    if local.type == "cpu":
        return Device("this CPU", peak, peak, 25e9, 0, _CPU_UTILIZATION, is_cpu=True)
    properties = torch.cuda.get_device_properties(local)
    known = next((d for key, d in DEVICES.items() if key in properties.name.lower().replace(" ", "")), None)
    return Device(properties.name, peak, peak, known.bandwidth if known else 1e12, properties.total_memory)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """``benchmark_matmul``, once in a process for each device, type and setting."""
    return _measured_peak(device, dtype, torch.get_num_threads(), torch.get_float32_matmul_precision())


@cache
def _measured_peak(device: torch.device, dtype: torch.dtype, *_settings: object) -> float:
    return benchmark_matmul(device, dtype)


def benchmark_matmul(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of large matrix products under the settings in force (threads, TF32); random generators are unchanged.

    Args:
        device: Where to multiply.
        dtype: Of the factors.
        seconds: About how long to measure; a slow device takes longer.

    Raises:
        torch.OutOfMemoryError: Not even small matrices fit.
    """
    sizes = _MATMUL_SIZES.get(device.type, (4096, 2048))
    for size in sizes:
        try:
            return _time_matmul(device, dtype, size, seconds)
        except torch.OutOfMemoryError:
            if size == sizes[-1]:
                raise
    raise AssertionError("every size either fits or raises")


@torch.no_grad()
def _time_matmul(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    """Median FLOP/s over groups of square products."""
    generator = torch.Generator(device).manual_seed(0)  # of constants, a GPU would be faster than of any real data
    a, b = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))
    out = torch.empty_like(a)

    def time_group(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b, out=out)
        synchronize(device)
        return (time.perf_counter() - began) / count

    time_group(1)  # kernels are loaded and chosen here
    count = max(1, round(seconds / (_MATMUL_GROUPS + 1) / time_group(1)))
    return 2 * size**3 / median(time_group(count) for _ in range(_MATMUL_GROUPS if count > 1 else 3))


def compute_dtype(model: nn.Module, precision: str) -> torch.dtype:
    """The type of the large products of a step.

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


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all kernels launched so far; a CPU launches none."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
