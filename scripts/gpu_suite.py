"""What only an accelerator can show: tests on it, and how fast every policy trains there, in one call.

    python scripts/gpu_suite.py [--out benchmarks/gpu.json]       # on a CUDA machine, under 8 minutes
    python scripts/gpu_suite.py --small --out suite.json         # the same on any machine, with tiny models

Tests are those of tests/test_devices.py and all that are skipped without CUDA. Speed is of LLaVAs with random weights
(the shapes of the nano model, and of TinyLlama 1.1 B under CLIP L/14 at 336 pixels), in bf16-mixed, as ``fit`` prepares
them: no padding, answers only, AdamW; and of a fit with and without callbacks. MFU is the least FLOPs that a step of
the policy can cost, a second, as a share of large matrix products measured in the same call.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import transformers
from gpu_suite_models import MODELS, SMALL, Shape, batch_of, built, conversations
from lightning.pytorch.callbacks import Callback
from machine import processor

from lightning_mm.callbacks import DriftCallback, GeometryCallback, ProbingCallback, Schedule
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.execution.prepare import Compute
from lightning_mm.execution.step import TrainingStep
from lightning_mm.execution.vision_truncation import truncate_tower
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.loading import Backbone
from lightning_mm.planning.devices import benchmark_matmul, synchronize
from lightning_mm.planning.flops import step_flops
from lightning_mm.testing.tiny import build_tiny
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import IntermediateOnly, TuningPolicy
from lightning_mm.tuning.apply import apply_plan
from lightning_mm.tuning.optimizer import OptimizerSettings, build_optimizer, parameter_groups
from lightning_mm.verbs.plan import POLICIES

TESTS = (
    "tests/test_devices.py",
    "tests/models/test_compile.py",
    "tests/training/callbacks/test_throughput.py",
    "tests/execution/cache/test_store.py",
)
PRECISION = "bf16-mixed"


def tested(seconds: float) -> dict[str, Any]:
    """Run the tests in a process of their own; the last lines of what they said."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *TESTS]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        told, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as late:
        told, code = str(late.stdout or ""), -1
    return {"exit": code, "seconds": time.perf_counter() - began, "told": told.splitlines()[-12:]}


def speed_of(shape: Shape, policy: TuningPolicy, batches: Sequence[Batch], device: torch.device, peak: float) -> Any:
    """Seconds, tokens, memory and MFU of one policy's steps."""
    model = built(shape, device)
    layout = ModelLayout.of(model)
    plan = policy.plan(layout)
    floor = sum(_floor(shape, policy, batch) for batch in batches[1:]) / (len(batches) - 1)
    apply_plan(MultimodalModel(model, layout), plan)
    step = TrainingStep(MultimodalModel(model, layout), plan, Compute(), checkpointing=False, precision=PRECISION)
    settings = OptimizerSettings(lr=1e-5)
    optimizer = build_optimizer(parameter_groups(MultimodalModel(model, layout), plan, settings), settings)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    with torch.autocast(device.type, torch.bfloat16):
        truncate_tower(MultimodalModel(model, layout), batches[0].to(device), ExitStack())
    for batch in batches:
        synchronize(device)
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = step.objective(batch.to(device)).nll / batch.num_supervised
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    taken = median(seconds[1:])
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    tokens = sum(len(batch.real) for batch in batches[1:]) / (len(batches) - 1)
    return {
        "seconds": taken,
        "tokens_per_second": tokens / taken,
        "floor_flops": floor,
        "mfu": floor / taken / peak,
        "peak_bytes": memory,
        "loss": loss.item(),
    }


def _floor(shape: Shape, policy: TuningPolicy, batch: Batch) -> float:
    with torch.device("meta"):
        model = shape.model()
    layout = ModelLayout.of(model)
    return step_flops(MultimodalModel(model, layout), policy.plan(layout), batch).floor


def looked_into(device: torch.device, folder: Path, small: bool) -> dict[str, float]:
    """Seconds of a fit with and without probes, geometry and drift, every ten steps; and what the looks took."""
    size = {"layers": 4, "hidden": 64} if small else {"layers": 16, "hidden": 1024}
    model = build_tiny("llava", folder / "model", **size)
    rows = str(conversations(folder, 32))
    found = {}
    for name, looks in (("off", []), ("on", [kind(Schedule(every=10, budget=None)) for kind in _LOOKS])):
        module = MMModule(Backbone(path=str(model)), IntermediateOnly())
        data = MMDataModule(train=rows, probes=rows, batch_size=8, num_workers=0, processor=str(model))
        steps = {"max_steps": 4 if small else 30, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            default_root_dir=folder / name,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision=PRECISION,
            logger=False,
            use_distributed_sampler=False,
            callbacks=list(looks),
            **steps,  # type: ignore[arg-type]
            **quiet,  # type: ignore[arg-type]
        )
        began = time.perf_counter()
        trainer.fit(module, datamodule=data)
        found[name] = time.perf_counter() - began
    return found


_LOOKS: tuple[type[Callback], ...] = (ProbingCallback, GeometryCallback, DriftCallback)


def main() -> None:
    """Run all, write down as it comes, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="Tiny models, on whatever device there is.")
    parser.add_argument("--steps", type=int, default=8, help="Timed, of each policy.")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--part", choices=("tests", "speed", "callbacks", "all"), default="all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu.json"))
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.small):
        raise SystemExit("There is no CUDA device here; --small runs the same on the CPU.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = benchmark_matmul(device, torch.bfloat16)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    result: dict[str, Any] = {"device": name, **versions, "precision": PRECISION, "rows": args.rows, "peak_flops": peak}
    if args.part in ("callbacks", "all"):
        with tempfile.TemporaryDirectory() as folder:
            result["callbacks"] = looked_into(device, Path(folder), args.small)
        _write(args.out, result)
    if args.part in ("speed", "all"):
        result["speed"] = {}
        for key, shape in (SMALL if args.small else MODELS).items():
            batches = [batch_of(shape, args.rows, seed) for seed in range(args.steps + 2)]
            result["speed"][key] = told = {}
            for policy in POLICIES:
                try:
                    told[policy.describe()] = found = speed_of(shape, policy, batches, device, peak)
                except (UserError, torch.OutOfMemoryError) as error:
                    told[policy.describe()] = {"left out": str(error).partition("\n")[0]}
                    continue
                finally:
                    gc.collect()
                    torch.cuda.empty_cache()
                print(f"{key}  {policy.describe():44} {found['seconds']:.3f} s  MFU {found['mfu']:.2f}", flush=True)
                _write(args.out, result)
    if args.part in ("tests", "all"):
        result["tests"] = tested(240)
        print("\n".join(result["tests"]["told"]), flush=True)
    _write(args.out, result)


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
