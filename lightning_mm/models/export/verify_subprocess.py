"""The script that verifies exported models in a new process, with transformers and PEFT only.

Data flow: jobs.json (folders, stored examples) -> processors and models -> answer.json (differences, complaints,
imported modules). A job may hold a chat with a picture: the folder's own processor renders and encodes it, the model
answers, and all three are compared with what the live model did.
It is run by its path, ``python -P verify_subprocess.py jobs.json answer.json``, and must not import this package.

Shapes: B rows, L tokens, N tokens that are not padding, V vocabulary.
"""

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

LOGITS = "reference.logits"
"""Name of the live model's logits among the stored inputs."""

CHAT = "chat."
"""Prefix of the chat's inputs among the stored tensors."""

ANSWER = "chat answer"
"""Name of the tokens that the live model answered the chat with, among the stored tensors."""

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
        results.append(run_job(job))
    answer.write_text(json.dumps({"results": results, "modules": sorted(sys.modules)}), encoding="utf-8")


@torch.no_grad()
def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Largest difference of a logit, largest logit, tensors that did not load correctly, and the result of the chat."""
    torch.set_float32_matmul_precision(job["matmul_precision"])
    torch.set_num_threads(job["threads"])
    model, complaints = load_adapted(job) if job["base"] else load_complete(job)
    model.eval()
    stored = load_file(job["example"], device=job["device"])
    expected = stored.pop(LOGITS)
    answer = stored.pop(ANSWER, None)
    inputs = {name: tensor for name, tensor in stored.items() if not name.startswith(CHAT)}
    found = without_padding(model(**inputs, use_cache=False).logits, inputs)
    difference = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    result = {"difference": difference, "scale": expected.abs().max().item(), "complaints": complaints}
    if answer is None:
        return {**result, "chat": None}
    encoded = {name.removeprefix(CHAT): tensor for name, tensor in stored.items() if name.startswith(CHAT)}
    return {**result, "chat": compare_chat(job, model, encoded, answer)}


def compare_chat(job: dict[str, Any], model: Any, expected: dict[str, Tensor], answer: Tensor) -> dict[str, Any]:
    """What the folder's processor and model make of a chat with a picture.

    Returns:
        "loaded_by": ``AutoProcessor``; ``parts`` where a video processor cannot be made without torchvision; empty
        where the processor cannot be loaded. "complaints": what differs from the live processor. "num_tokens": length
        of the live answer. "num_same": tokens until the answers part. "margin": by how much the fresh model prefers
        its own token there.
    """
    untested = {"loaded_by": "", "num_tokens": len(answer), "num_same": 0, "margin": 0.0}
    try:
        processor, loaded_by = load_processor(job["folder"] if job["has_processor"] else job["base"], job["revision"])
    except (OSError, ValueError, ImportError) as error:
        return {**untested, "complaints": [f"processor cannot be loaded: {str(error).strip().splitlines()[0]}"]}
    picture = Image.open(job["picture"]).convert("RGB")
    question = {"type": "text", "text": job["question"]}
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, question]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(job["device"])
    complaints = [] if text == job["text"] else ["chat template renders another text"]
    for name, tensor in expected.items():
        if name not in inputs or inputs[name].shape != tensor.shape or not torch.equal(inputs[name], tensor):
            complaints.append(f"processor gives another {name}")
    done = model.generate(**inputs, **job["generate"], return_dict_in_generate=True, output_logits=True)
    own = done.sequences[0, inputs["input_ids"].shape[1] :]
    length = min(len(own), len(answer))
    same = int((own[:length] == answer[:length]).long().cumprod(0).sum())
    margin = 0.0
    if same < length:
        logits = done.logits[same][0].float()
        margin = (logits[own[same]] - logits[answer[same]]).item()
    elif len(own) != len(answer):
        complaints.append(f"answer has {len(own)} tokens, not {len(answer)}")
    found = {"complaints": complaints, "num_tokens": len(answer), "num_same": same, "margin": margin}
    return {"loaded_by": loaded_by, **found}


def load_processor(folder: str, revision: str | None) -> tuple[Any, str]:
    """The folder's processor, and how it was loaded."""
    loader: Any = AutoProcessor
    try:
        return loader.from_pretrained(folder, revision=revision), "AutoProcessor"
    except ImportError as error:
        if is_torchvision_available() or "torchvision" not in str(error).lower():
            raise
    base: Any = ProcessorMixin
    own = base.__dict__["get_attributes"]

    def without_video(cls: type[ProcessorMixin]) -> list[str]:
        video = inspect.signature(cls.__init__).parameters.get("video_processor")
        left_out = "video_processor" if video is not None and video.default is None else None
        return [part for part in own.__func__(cls) if part != left_out]

    base.get_attributes = classmethod(without_video)
    try:
        return loader.from_pretrained(folder, revision=revision), "parts"
    finally:
        base.get_attributes = own


def without_padding(logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, L, V) -> (N, V) in float32: logits at padding need not agree."""
    mask = inputs.get("attention_mask")
    return (logits.flatten(0, 1) if mask is None else logits[mask.to(logits.device).bool()]).float()


def load_complete(job: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """The model of a complete folder, and its missing, unexpected and mismatched tensors."""
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        job["folder"],
        dtype=getattr(torch, job["dtype"]),
        attn_implementation=job["attention"],
        output_loading_info=True,
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
