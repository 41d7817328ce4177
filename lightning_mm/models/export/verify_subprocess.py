"""The script that verifies exported models in a new process, with transformers and PEFT only.

Data flow: jobs.json (folders, stored examples) -> models -> answer.json (differences, complaints, imported modules).
It is run by its path, ``python -P verify_subprocess.py jobs.json answer.json``, and must not import this package.

Shapes: B rows, L tokens, N tokens that are not padding, V vocabulary.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

LOGITS = "reference.logits"
"""Name of the live model's logits among the stored inputs."""

MARK = "loading "
"""Prefix of the line on stderr that names the folder being loaded."""


def main(jobs: Path, answer: Path) -> None:
    """Run all jobs; a folder that cannot be loaded ends the process with its error.

    Args:
        jobs: JSON file with the list of jobs.
        answer: JSON file to write.
    """
    results = []
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        print(f"{MARK}{job['folder']}", file=sys.stderr)
        results.append(compare_logits(job))
    answer.write_text(json.dumps({"results": results, "modules": sorted(sys.modules)}), encoding="utf-8")


@torch.no_grad()
def compare_logits(job: dict[str, Any]) -> dict[str, Any]:
    """Largest difference of a logit, largest logit, and tensors that did not load correctly."""
    torch.set_float32_matmul_precision(job["matmul_precision"])
    torch.set_num_threads(job["threads"])
    model, complaints = load_adapted(job) if job["base"] else load_complete(job)
    model.eval()
    inputs = load_file(job["example"], device=job["device"])
    expected = inputs.pop(LOGITS)
    found = without_padding(model(**inputs, use_cache=False).logits, inputs)
    difference = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    return {"difference": difference, "scale": expected.abs().max().item(), "complaints": complaints}


def without_padding(logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, L, V) -> (N, V) in float32: logits at padding need not agree."""
    mask = inputs.get("attention_mask")
    return (logits.flatten(0, 1) if mask is None else logits[mask.to(logits.device).bool()]).float()


def load_complete(job: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """The model of a complete folder, and its missing, unexpected and mismatched tensors."""
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        job["folder"], attn_implementation=job["attention"], output_loading_info=True
    )
    model, report = loaded
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    complaints = [f"{kind.partition('_')[0]} {key}" for kind in kinds for key in sorted(map(str, report[kind]))]
    return model.to(job["device"]), complaints


def load_adapted(job: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """The base model with the adapter, and the adapter's tensors that differ from those in the file."""
    from peft import PeftModel, get_peft_model_state_dict

    options: dict[str, Any] = {"dtype": getattr(torch, job["dtype"]), "attn_implementation": job["attention"]}
    if job["quantization"] is not None:
        options["quantization_config"] = BitsAndBytesConfig.from_dict(job["quantization"])
    base = AutoModelForImageTextToText.from_pretrained(job["base"], revision=job["revision"], **options)
    if job["quantization"] is None:
        base.to(job["device"])
    # Without autocast_adapter_dtype the adapter keeps the dtype it was trained in.
    model = PeftModel.from_pretrained(base, job["folder"], autocast_adapter_dtype=False)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    written = load_file(Path(job["folder"]) / "adapter_model.safetensors")
    complaints = [f"unexpected {name}" for name in sorted(written.keys() - loaded.keys())]
    complaints += [f"missing {name}" for name in sorted(loaded.keys() - written.keys())]
    both = written.keys() & loaded.keys()
    complaints += [f"changed {name}" for name in sorted(both) if not torch.equal(loaded[name].cpu(), written[name])]
    return model, complaints


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
