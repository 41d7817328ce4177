"""What devices can do, and how long a step takes on one of them.

Data flow: a device's name, or a measurement here -> ``Device``; FLOPs and bytes of a step -> seconds.
"""

import os
from dataclasses import dataclass

import torch

from lightning_mm.errors import UserError
from lightning_mm.tuning.peak import matmul_peak

_ON_CPU = 0.65
_OPTIMIZER_PASSES = 7
"""AdamW reads weight, gradient and two moments, and writes weight and moments."""


@dataclass(frozen=True)
class Device:
    """A device's peaks.

    Args:
        name: What it is called.
        bf16: FLOP/s of dense bfloat16 products, summed in float32.
        fp32: FLOP/s of float32 products, without TF32.
        bandwidth: Bytes/s of its memory.
        memory: Bytes; 0 where it is not known.
        utilisation: Share of the peak that a step is assumed to reach, norms and kernel launches included.
        processor: Whether it is a CPU, where short rows' attention is written out (``models.processors``).
    """

    name: str
    bf16: float
    fp32: float
    bandwidth: float
    memory: float
    utilisation: float = 0.45
    processor: bool = False

    def seconds(self, flops: float, trained_bytes: float, bf16: bool) -> float:
        """Predicted time of a step: products at the assumed utilisation, then the optimizer at the memory's speed."""
        peak = self.bf16 if bf16 else self.fp32
        return flops / (peak * self.utilisation) + _OPTIMIZER_PASSES * trained_bytes / self.bandwidth


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


def device(name: str, bf16: bool) -> Device:
    """A device by name.

    Args:
        name: Of the table; 'cpu' is this machine's by its number of cores; 'measured' times products here, on the GPU
            where there is one.
        bf16: Which products to time.

    Raises:
        UserError: Nobody knows such a device.
    """
    plain = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    if plain in DEVICES:
        return DEVICES[plain]
    if plain == "cpu":
        # Two fused multiply-adds of 8 float32 numbers a cycle (AVX2) at 2.5 GHz; two channels of DDR4-3200, halved.
        cores = os.cpu_count() or 1
        return Device(f"CPU, {cores} cores", 80e9 * cores, 80e9 * cores, 25e9, 0, _ON_CPU, processor=True)
    if plain == "measured":
        return _measured(bf16)
    raise UserError(
        f"--device {name} is not known.", "It is in no table.", f"Use {', '.join(DEVICES)}, cpu or measured."
    )


def _measured(bf16: bool) -> Device:
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = matmul_peak(here, torch.bfloat16 if bf16 else torch.float32)
    if here.type == "cpu":
        return Device("this CPU", peak, peak, 25e9, 0, _ON_CPU, processor=True)
    properties = torch.cuda.get_device_properties(here)
    known = next((d for key, d in DEVICES.items() if key in properties.name.lower().replace(" ", "")), None)
    return Device(properties.name, peak, peak, known.bandwidth if known else 1e12, properties.total_memory)
