"""Verification of an export: a new process without this package loads the folder and compares logits.

Data flow: live model + one example's inputs -> ``take_reference`` -> ``Reference``; folder + reference ->
``verify_export`` -> files in a temporary folder -> ``verify_subprocess`` in a new process -> ``ExportCheckResult``, or
an error.

Shapes: B rows, L tokens, N tokens that are not padding, V vocabulary.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.models.export import verify_subprocess

TOLERANCE = {"float32": 1e-5, "float16": 8e-3, "bfloat16": 6e-2}
"""Largest difference of a logit, as a share of the largest logit.

A merged weight rounds W + BA where the live model adds W x and B A x, and another process may sum in another order:
each costs about one unit in the last place per layer. The tolerances are about 80 units of float32 and 8 of the 16-bit
types: enough for some tens of layers, and far below the effect of a wrong tensor.
"""


@dataclass(frozen=True)
class Reference:
    """The live model's logits of one example, and the settings they were computed with.

    Args:
        inputs: Inputs of the model's forward.
        logits: (N, V) float32, without padding.
        setting: How to load and run a model so that it computes the same: dtype, attention, device, ...
    """

    inputs: Mapping[str, Tensor]
    logits: Tensor
    setting: Mapping[str, Any]


@dataclass(frozen=True)
class ExportCheck:
    """An exported folder, and the reference that it must reproduce.

    Args:
        folder: A complete folder or an adapter folder.
        reference: Logits of the live model.
        base: Folder or hub name of an adapter's base model; None (default) for a complete folder.
        revision: Revision of the base model; None (default): the hub's default.
    """

    folder: Path | str
    reference: Reference
    base: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class ExportCheckResult:
    """Difference between an exported folder and its reference, measured in a new process.

    Args:
        difference: Largest absolute difference of a logit.
        scale: Largest absolute logit of the live model.
        tolerance: Largest accepted ``difference / scale``.
        complaints: Tensors that were missing, unexpected or changed on loading.
    """

    difference: float
    scale: float
    tolerance: float
    complaints: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every tensor was loaded and the logits agree; False if any logit is NaN."""
        return not self.complaints and self.difference <= self.tolerance * self.scale


@torch.no_grad()
def take_reference(model: nn.Module, inputs: Mapping[str, Tensor]) -> Reference:
    """The live model's logits in eval mode; every module's mode is restored afterwards.

    Args:
        model: A transformers model, with or without adapters.
        inputs: Inputs of the model's forward for one real example; ``input_ids`` (B, L).
    """
    modes = {module: module.training for module in model.modules()}
    setting = _setting(model)
    model.eval()
    try:
        logits = model(**{k: v.to(setting["device"]) for k, v in inputs.items()}, use_cache=False).logits
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Reference(dict(inputs), verify_subprocess.without_padding(logits, inputs), setting)


def _setting(model: Any) -> dict[str, Any]:
    quantized = getattr(model, "hf_quantizer", None) is not None
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "device": str(model.device),
        "quantization": model.config.quantization_config.to_dict() if quantized else None,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
    }


def verify_export(check: ExportCheck) -> ExportCheckResult:
    """The result of one check; raises unless the folder restores the model.

    Raises:
        UserError: The folder cannot be loaded, lacks a tensor, or gives other logits than the live model.
    """
    (result,) = compare_exports([check])
    if not result.passed:
        wrong = f"; {len(result.complaints)} tensors are wrong: {result.complaints[0]}" if result.complaints else ""
        raise UserError(
            f"{check.folder} does not restore the trained model.",
            f"In a fresh process its logits, of up to {result.scale:.3g}, differ by {result.difference:.3g}{wrong}.",
            "Do not use the folder. Check that the base model is the one trained on, and report the model's type.",
        )
    log_decision(
        "export.proof", f"largest logit difference {result.difference:.2g}", "loaded by a fresh process without us"
    )
    return result


def compare_exports(checks: Sequence[ExportCheck]) -> list[ExportCheckResult]:
    """Results of several checks, from one new process, since it takes seconds to start.

    Raises:
        UserError: A folder cannot be loaded.
    """
    with TemporaryDirectory() as scratch:
        jobs = [_job(check, Path(scratch) / f"{i}.safetensors") for i, check in enumerate(checks)]
        results, modules = _run(jobs, Path(scratch))
    assert not any(name.partition(".")[0] == "lightning_mm" for name in modules), (
        "the new process imported this package"
    )
    tolerances = [TOLERANCE[check.reference.setting["dtype"]] for check in checks]
    return [
        ExportCheckResult(found["difference"], found["scale"], tolerance, tuple(found["complaints"]))
        for found, tolerance in zip(results, tolerances, strict=True)
    ]


def _job(check: ExportCheck, example: Path) -> dict[str, Any]:
    tensors = {verify_subprocess.LOGITS: check.reference.logits, **check.reference.inputs}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, example)
    place = {"folder": str(check.folder), "base": check.base, "revision": check.revision, "example": str(example)}
    return {**place, **check.reference.setting}


def _run(jobs: list[dict[str, Any]], scratch: Path) -> tuple[list[dict[str, Any]], list[str]]:
    order, answer = scratch / "jobs.json", scratch / "answer.json"
    order.write_text(json.dumps(jobs), encoding="utf-8")
    # -P: do not search the script's folder for modules, where those of this package have short names.
    command = [sys.executable, "-P", verify_subprocess.__file__, str(order), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        at = next((line for line in reversed(lines) if line.startswith(verify_subprocess.MARK)), jobs[0]["folder"])
        raise UserError(
            f"{at.removeprefix(verify_subprocess.MARK)} cannot be loaded by a fresh process.",
            lines[-1] if lines else f"It ended with status {done.returncode}.",
            "Do not use the folder. Check that its base model and the installed packages are those of the training.",
        )
    found = json.loads(answer.read_text(encoding="utf-8"))
    return found["results"], found["modules"]
