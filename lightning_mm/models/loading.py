"""Load a Hugging Face multimodal LLM from a folder or a hub name, without remote code.

Data flow: ``Backbone`` (config) -> the skeleton on the meta device (for planning) -> the model with its weights.
"""

import difflib
from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PretrainedConfig
from transformers.utils import logging as hf_logging

from lightning_mm.core.choices import refuse_other_choices
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError, missing_package
from lightning_mm.models.finite_weights import refuse_nonfinite_weights
from lightning_mm.models.folder_checks import check_config, check_files, check_memory


@dataclass(frozen=True)
class Backbone:
    """The model to be tuned.

    Args:
        path: Folder or hub name of an image-text-to-text model.
        revision: Commit, tag or branch of a hub model.
        dtype: Type of the weights in memory; 'auto' is float32, which AdamW needs to add small updates.
        attention: Attention kernel; 'auto' leaves the choice to transformers. flex_attention trains on CUDA only.
        quantization: Hold what is frozen in 4 bits (nf4) or 8 bits (int8); what trains at full rank is left as it is.
    """

    path: str
    _: KW_ONLY
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    quantization: Literal["none", "nf4", "int8"] = "none"

    def __post_init__(self) -> None:
        refuse_other_choices(self, "model.backbone")


def load_skeleton(backbone: Backbone) -> nn.Module:
    """The model on the meta device: names, shapes and config without weights. Raises UserError as ``load_model``."""
    config = read_config(backbone)
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # of any kind: the config is not ours
        raise _unsupported(backbone, config, error) from error


def load_model(backbone: Backbone, keep_full: Collection[str] = ()) -> nn.Module:
    """The model with its weights, in eval mode.

    Args:
        backbone: The model to load.
        keep_full: Names of modules that must not be quantized, since they will train at full rank; none by default.

    Raises:
        UserError: There is no such model, its type is not supported, or weights are missing, pickled or not finite.
    """
    config = read_config(backbone)
    if Path(backbone.path).is_dir():
        check_memory(Path(backbone.path))
    dtype = torch.bfloat16 if backbone.dtype == "bfloat16" else torch.float32
    if backbone.dtype == "auto":
        log_decision("model.backbone.dtype", "float32", "AdamW in place on bfloat16 weights loses small updates")
    options: dict[str, Any] = {"dtype": dtype, "revision": backbone.revision, "use_safetensors": True}
    if backbone.attention == "flex_attention" and not torch.cuda.is_available():
        raise _no_kernel(backbone, "It has no backward pass on this machine's processor.")
    if backbone.attention != "auto":
        options["attn_implementation"] = backbone.attention
    if backbone.quantization != "none":
        if find_spec("bitsandbytes") is None:
            raise missing_package(f"model.backbone.quantization {backbone.quantization}", "bitsandbytes")
        options["quantization_config"] = _quantization(backbone, dtype, keep_full)
    # Missing and unexpected tensors are reported below instead.
    hf_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            backbone.path, config=config, trust_remote_code=False, output_loading_info=True, **options
        )
        model, report = loaded
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: the folder is not ours
        if backbone.attention != "auto" and "attention" in str(error).lower():
            raise _no_kernel(backbone, _first_line(error)) from error
        raise _unsupported(backbone, config, error) from error
    _refuse_missing(backbone, report)
    refuse_nonfinite_weights(model, backbone.path, backbone.revision)
    kernel = getattr(model.config, "_attn_implementation", "eager")
    log_decision(
        "model.backbone.attention", kernel, "asked for" if backbone.attention != "auto" else "transformers' choice"
    )
    return model


def _near_folder(path: Path) -> str:
    """'Did you mean X?' with the entry beside a missing path that is spelled most like it; empty if none is."""
    there = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.8)
    return f"Did you mean {path.parent / near[0]}?" if near else ""


def read_config(backbone: Backbone) -> PretrainedConfig:
    """The model's config, a cheap check that the model exists. Raises UserError if there is none."""
    folder = Path(backbone.path)
    # A hub name has two parts at most, and there may be a folder of its owner's name here.
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2):
        parent = folder.parent
        raise UserError(
            f"model.backbone.path: there is no folder {folder}.",
            f"{parent} is here, without it." if parent.is_dir() else f"There is no {parent} either.",
            _near_folder(folder) or "Name a folder that save_pretrained wrote.",
        )
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(
            f"model.backbone.path: {backbone.path} is not a Hugging Face model.",
            "The folder holds no config.json.",
            "Name the folder that save_pretrained wrote.",
        )
    if folder.exists():
        check_files(folder)
    try:
        written, _ = PretrainedConfig.get_config_dict(backbone.path, revision=backbone.revision)
        check_config(backbone.path, written)
        return AutoConfig.from_pretrained(backbone.path, revision=backbone.revision, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # of any kind: the config is not ours
        raise UserError(
            f"model.backbone.path: {backbone.path} cannot be loaded.",
            _first_line(error),
            _near_folder(folder) or f"Name a folder, or fetch the model first: hf download {backbone.path}",
        ) from error


def _quantization(backbone: Backbone, dtype: torch.dtype, keep_full: Collection[str]) -> BitsAndBytesConfig:
    log_decision(
        "model.backbone.quantization",
        backbone.quantization,
        f"frozen linear layers only; {len(keep_full)} modules stay in {str(dtype).removeprefix('torch.')}",
    )
    if backbone.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=sorted(keep_full))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=sorted(keep_full),
    )


def _refuse_missing(backbone: Backbone, report: dict[str, Any]) -> None:
    """Raise UserError if weights are missing: they would be random. Logs unexpected ones."""
    missing = sorted(report.get("missing_keys", ())) + [str(m) for m in report.get("mismatched_keys", ())]
    if missing:
        raise UserError(
            f"model.backbone.path: {backbone.path} is incomplete.",
            f"{len(missing)} tensors are missing or of another shape, such as {', '.join(missing[:4])}.",
            "Use a complete checkpoint of this architecture, or the transformers version that wrote it.",
        )
    if unexpected := sorted(report.get("unexpected_keys", ())):
        log_decision("model.backbone.path", f"{len(unexpected)} tensors not used", f"such as {unexpected[0]}")


def _no_kernel(backbone: Backbone, why: str) -> UserError:
    return UserError(
        f"model.backbone.attention: {backbone.attention} is not available.", why, "Set model.backbone.attention sdpa."
    )


def _unsupported(backbone: Backbone, config: PretrainedConfig, error: Exception) -> UserError:
    return UserError(
        f"model.backbone.path: {backbone.path} ({config.model_type}) cannot be loaded as an image-text-to-text model.",
        _first_line(error),
        "Check the folder's files (config.json, *.safetensors) and the installed transformers version.",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__
