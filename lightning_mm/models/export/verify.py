"""Verification of an export: a new process without this package loads the folder, compares logits, and chats with it.

Data flow: live model + one example's inputs -> ``take_reference`` -> ``Reference``; live model and processor + a
question about a picture -> ``take_chat`` -> ``ChatReference``; folder + references -> ``verify_export`` -> files in a
temporary folder -> ``verify_subprocess`` in a new process -> ``ExportCheckResult``, or an error.

Shapes: B rows, L tokens, N tokens that are not padding, A tokens of an answer, V vocabulary.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.models.export import verify_subprocess
from lightning_mm.models.generation import GREEDY, greedy_tokens
from lightning_mm.models.processor import ModelProcessor

TOLERANCE = {"float32": 1e-5, "float16": 8e-3, "bfloat16": 6e-2}
"""Largest difference of a logit, as a share of the largest logit.

A merged weight rounds W + BA where the live model adds W x and B A x, and another process may sum in another order:
each costs about one unit in the last place per layer. The tolerances are about 80 units of float32 and 8 of the 16-bit
types: enough for some tens of layers, and far below the effect of a wrong tensor. The coarser of two dtypes counts: the
one that the live model computes in, and the one that the folder's weights were rounded to.
"""

MAX_NEW_TOKENS = 8
"""Length of the answer that the live model and the new process both give."""


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
class ChatReference:
    """The live model's answer to a question about a picture.

    Args:
        question: The question.
        picture: The picture.
        text: The chat as the live processor renders it.
        inputs: What the live processor makes of it.
        answer: (A,) tokens of the live model's greedy answer.
    """

    question: str
    picture: Image.Image
    text: str
    inputs: Mapping[str, Tensor]
    answer: Tensor


@dataclass(frozen=True)
class ExportCheck:
    """An exported folder, and the reference that it must reproduce.

    Args:
        folder: A complete folder or an adapter folder.
        reference: Logits of the live model.
        base: Folder or hub name of an adapter's base model; None (default) for a complete folder.
        revision: Revision of the base model; None (default): the hub's default.
        chat: Answer of the live model that the folder's processor and model must give too; None (default): not asked.
    """

    folder: Path | str
    reference: Reference
    base: str | None = None
    revision: str | None = None
    chat: ChatReference | None = None


@dataclass(frozen=True)
class ExportCheckResult:
    """Difference between an exported folder and its reference, measured in a new process.

    Args:
        difference: Largest absolute difference of a logit.
        scale: Largest absolute logit of the live model.
        tolerance: Largest accepted ``difference / scale``.
        complaints: Tensors that were missing, unexpected or changed on loading, and what differs in the chat.
        loaded_by: How the folder's processor was loaded: ``AutoProcessor``, or ``parts``: transformers loads no
            processor of this class without torchvision, the base's neither; empty without a chat.
        num_tokens: Number of tokens of the live answer; 0 without a chat.
        num_same: Number of them that the new process gives too, before the first other one.
    """

    difference: float
    scale: float
    tolerance: float
    complaints: tuple[str, ...]
    loaded_by: str = ""
    num_tokens: int = 0
    num_same: int = 0

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
    setting = _setting(model)
    with _eval_mode(model):
        logits = model(**{k: v.to(setting["device"]) for k, v in inputs.items()}, use_cache=False).logits
    return Reference(dict(inputs), verify_subprocess.without_padding(logits, inputs), setting)


def take_chat(
    model: nn.Module, processing: ModelProcessor, question: str | None = None, picture: Image.Image | None = None
) -> ChatReference:
    """The live model's greedy answer to a question about a picture; every module's mode is restored afterwards.

    Args:
        model: A transformers model, with or without adapters.
        processing: The model's processor.
        question: The question; None (default): a standard one.
        picture: The picture; None (default): a drawn one of 64 x 48 pixels.
    """
    question, picture = question or "What is in the picture?", (picture or _drawn_picture()).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processing.render([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processing.encode([text], [[picture]], "left").inputs
    device = next(model.parameters()).device
    with _eval_mode(model):
        answer = greedy_tokens(model, {k: v.to(device) for k, v in inputs.items()}, MAX_NEW_TOKENS)[0]
    return ChatReference(question, picture, text, inputs, answer)


def _drawn_picture() -> Image.Image:
    picture = Image.new("RGB", (64, 48), (30, 60, 160))
    picture.paste((220, 40, 40), (8, 8, 32, 40))
    return picture


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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
        UserError: The folder cannot be loaded, lacks a tensor, or gives other logits or another answer than the live
            model.
    """
    (result,) = compare_exports([check])
    if not result.passed:
        wrong = f"; {len(result.complaints)} things are wrong: {result.complaints[0]}" if result.complaints else ""
        raise UserError(
            f"{check.folder} does not restore the trained model.",
            f"In a fresh process its logits, of up to {result.scale:.3g}, differ by {result.difference:.3g}{wrong}.",
            "Do not use the folder. Check that the base model is the one trained on, and report the model's type.",
        )
    log_decision(
        "export.proof",
        f"largest logit difference {result.difference:.2g} of {result.scale:.3g}",
        f"loaded by a fresh process without us; up to {result.tolerance:g} of the largest logit is rounding",
    )
    if check.chat is not None:
        asked = "a chat with a picture is rendered, encoded and answered as by the live model"
        parted = "" if result.num_same == result.num_tokens else ", until two tokens are equal but for rounding"
        log_decision("export.chat", f"{result.num_same} of {result.num_tokens} tokens alike", f"{asked}{parted}")
    if result.loaded_by == "parts":
        log_decision(
            "export.processor", "checked without its video processor", "transformers loads none without torchvision"
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
    return [_result(check, found) for check, found in zip(checks, results, strict=True)]


def _result(check: ExportCheck, found: dict[str, Any]) -> ExportCheckResult:
    tolerance = max(TOLERANCE[name] for name in (check.reference.setting["dtype"], _written_dtype(check)))
    result = ExportCheckResult(found["difference"], found["scale"], tolerance, tuple(found["complaints"]))
    if (chat := found["chat"]) is None:
        return result
    complaints = [*result.complaints, *chat["complaints"]]
    # Where the answers part, both tokens must be likely alike: each logit may be off by the tolerance.
    if not chat["margin"] <= 2 * tolerance * found["scale"]:
        complaints.append(f"answer differs from token {chat['num_same']} on")
    chatted = {name: chat[name] for name in ("loaded_by", "num_tokens", "num_same")}
    return replace(result, complaints=tuple(complaints), **chatted)


def _written_dtype(check: ExportCheck) -> str:
    """The dtype that a complete folder states; that of the live model for an adapter."""
    live: str = check.reference.setting["dtype"]
    if check.base is not None:
        return live
    config = json.loads((Path(check.folder) / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype", live))


def _job(check: ExportCheck, example: Path) -> dict[str, Any]:
    tensors = {verify_subprocess.LOGITS: check.reference.logits, **check.reference.inputs}
    job: dict[str, Any] = {
        "folder": str(check.folder),
        "base": check.base,
        "revision": check.revision,
        "example": str(example),
    }
    if (chat := check.chat) is not None:
        chat.picture.save(picture := example.with_suffix(".png"))
        tensors |= {f"{verify_subprocess.CHAT}{name}": tensor for name, tensor in chat.inputs.items()}
        tensors[verify_subprocess.ANSWER] = chat.answer
        job |= {
            "question": chat.question,
            "text": chat.text,
            "picture": str(picture),
            "has_processor": (Path(check.folder) / "tokenizer_config.json").is_file(),
            "generate": {"max_new_tokens": MAX_NEW_TOKENS, **GREEDY},
        }
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, example)
    return {**job, **check.reference.setting}


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
