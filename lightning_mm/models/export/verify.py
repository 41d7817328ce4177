"""The proof of an export: a fresh process, without us, loads the folder and must come to the live model's logits.

Data flow: live model + one example's inputs -> ``take_reference`` -> ``Reference``; folder + reference -> ``prove`` ->
files in a temporary folder -> ``fresh`` in a process of its own -> ``Verdict``, or an error.

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
each costs a unit or so in the last place per layer. These are about 80 units of float32 and 8 of the short types: room
for some tens of layers, and far below what a wrong tensor does.
"""


@dataclass(frozen=True)
class Reference:
    """What the live model makes of one example, and under which arithmetic.

    Args:
        inputs: What its forward took.
        logits: (N, V) float32, without padding.
        setting: How to load and run a model so that it computes as this one did: dtype, attention, device, ...
    """

    inputs: Mapping[str, Tensor]
    logits: Tensor
    setting: Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """That a folder restores the model a reference was taken of.

    Args:
        folder: A complete folder, or an adapter's.
        reference: Of the live model.
        base: Folder or hub name that an adapter belongs to; None for a complete folder.
        revision: Revision of the base.
    """

    folder: Path | str
    reference: Reference
    base: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What the fresh process found.

    Args:
        difference: Largest absolute difference of a logit.
        scale: Largest absolute logit of the live model.
        tolerance: Largest ``difference / scale`` that is let pass.
        complaints: Tensors that were missing, left over or changed on loading.
    """

    difference: float
    scale: float
    tolerance: float
    complaints: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether every tensor was loaded and the logits agree; not so if any is NaN."""
        return not self.complaints and self.difference <= self.tolerance * self.scale


@torch.no_grad()
def take_reference(model: nn.Module, inputs: Mapping[str, Tensor]) -> Reference:
    """The live model's logits in eval mode; every module's mode is put back afterwards.

    Args:
        model: A transformers model, with or without adapters.
        inputs: One real example as its forward takes it; ``input_ids`` (B, L).
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


def prove(claim: Claim) -> Verdict:
    """Hold an export to its promise.

    Raises:
        UserError: It cannot be loaded, loses a tensor, or gives other logits than the live model.
    """
    (verdict,) = examine([claim])
    if not verdict.holds:
        wrong = f"; {len(verdict.complaints)} tensors are wrong: {verdict.complaints[0]}" if verdict.complaints else ""
        raise UserError(
            f"{claim.folder} does not restore the trained model.",
            f"In a fresh process its logits, of up to {verdict.scale:.3g}, differ by {verdict.difference:.3g}{wrong}.",
            "Do not use the folder. Check that the base model is the one trained on, and report the model's type.",
        )
    log_decision(
        "export.proof", f"largest logit difference {verdict.difference:.2g}", "loaded by a fresh process without us"
    )
    return verdict


def examine(claims: Sequence[Claim]) -> list[Verdict]:
    """Verdicts on several folders from one fresh process, which takes seconds to start.

    Raises:
        UserError: A folder cannot be loaded at all.
    """
    with TemporaryDirectory() as scratch:
        jobs = [_job(claim, Path(scratch) / f"{i}.safetensors") for i, claim in enumerate(claims)]
        results, modules = _run(jobs, Path(scratch))
    assert not any(name.partition(".")[0] == "lightning_mm" for name in modules), "the fresh process had us in it"
    tolerances = [TOLERANCE[claim.reference.setting["dtype"]] for claim in claims]
    return [
        Verdict(found["difference"], found["scale"], tolerance, tuple(found["complaints"]))
        for found, tolerance in zip(results, tolerances, strict=True)
    ]


def _job(claim: Claim, example: Path) -> dict[str, Any]:
    tensors = {verify_subprocess.LOGITS: claim.reference.logits, **claim.reference.inputs}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, example)
    place = {"folder": str(claim.folder), "base": claim.base, "revision": claim.revision, "example": str(example)}
    return {**place, **claim.reference.setting}


def _run(jobs: list[dict[str, Any]], scratch: Path) -> tuple[list[dict[str, Any]], list[str]]:
    order, answer = scratch / "jobs.json", scratch / "answer.json"
    order.write_text(json.dumps(jobs), encoding="utf-8")
    # -P: the script's own folder is not searched for modules, where ours would be found by their short names.
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
