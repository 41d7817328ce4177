"""The dtype that an export's weights are written in: the base's, so that a folder does not double in size.

Data flow: base's config.json or weight files -> ``resolve_dtype`` -> ``round_weights`` -> state dict to write, and
``Rounding``, which says what it cost.

Training holds weights in float32, because small updates are lost in 16 bits. A frozen weight that came from a 16-bit
file returns to its bits exactly; one that trained is rounded to the nearest value.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import AutoConfig

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError

WrittenDtype = Literal["auto", "float32", "bfloat16", "float16"]
"""'auto' is the dtype of the base model's files."""

_FILE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Rounding:
    """What writing weights in another dtype than they were held in has changed.

    Args:
        dtype: Dtype of the written weights.
        num_rounded: Number of tensors that changed.
        num_tensors: Number of floating-point tensors.
        relative: Norm of all differences of the changed tensors, over the norm of these tensors.
    """

    dtype: torch.dtype
    num_rounded: int
    num_tensors: int
    relative: float


def resolve_dtype(asked: WrittenDtype, model: Any, base: str, revision: str | None = None) -> torch.dtype:
    """The dtype to write weights in; the choice is logged with its reason.

    Args:
        asked: What the user asks for.
        model: The live model (transformers), whose dtype is used if the base's cannot be found.
        base: Folder or hub name of the base model.
        revision: Revision of a hub model; None (default): the hub's default.

    Raises:
        UserError: ``asked`` is not one of ``WrittenDtype``.
    """
    if asked not in get_args(WrittenDtype):
        raise UserError(
            f"dtype: {asked} is not written.", "It is not known.", f"Use {', '.join(get_args(WrittenDtype))}."
        )
    if asked != "auto":
        return _named(asked)
    name = _base_dtype(base, revision)
    held = str(model.dtype).removeprefix("torch.")
    reason = f"the dtype of {base}" if name else f"as the model is held; the dtype of {base} cannot be found"
    log_decision("export.dtype", name or held, reason)
    return _named(name or held)


def _named(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _base_dtype(base: str, revision: str | None) -> str | None:
    """The dtype that the base's config states, or else that of most of its weights; None if neither is at hand."""
    folder = Path(base)
    if not folder.is_dir() and ("/" not in base or folder.is_absolute()):
        return None
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    decoder = config.get_text_config(decoder=True)
    stated = getattr(config, "dtype", None) or getattr(decoder, "dtype", None)
    name = str(stated).removeprefix("torch.") if stated is not None else _file_dtype(folder)
    return name if name in _FILE_DTYPES.values() else None


def _file_dtype(folder: Path) -> str | None:
    """The dtype of most values in the safetensors files of a folder, from their headers."""
    counts: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for tensor in (entry for name, entry in header.items() if name != "__metadata__"):
            counts[tensor["dtype"]] += torch.Size(tensor["shape"]).numel()
    floats = [(count, name) for name, count in counts.items() if name in _FILE_DTYPES]
    return _FILE_DTYPES[max(floats)[1]] if floats else None


@torch.no_grad()
def round_weights(
    state: Mapping[str, Tensor], dtype: torch.dtype, keep_float32: frozenset[str] = frozenset()
) -> tuple[dict[str, Tensor], Rounding]:
    """A state dict in another dtype, and what that cost. Tensors that are one in memory stay one.

    Args:
        state: Tensors by name; those that are not floating-point, or have the dtype already, are passed on as they are.
        dtype: The dtype to write.
        keep_float32: Parts of names of tensors that transformers always holds in float32.

    Raises:
        UserError: A value is too large for the dtype.
    """
    written: dict[str, Tensor] = {}
    done: dict[tuple[int, torch.Size], Tensor] = {}
    num_rounded = num_floats = 0
    lost = held = 0.0
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        kept = not tensor.is_floating_point() or keep_float32.intersection(name.split("."))
        num_floats += tensor.is_floating_point()
        if kept or tensor.dtype == dtype:
            written[name] = tensor
        elif key in done and tensor.numel():
            written[name] = done[key]
        else:
            written[name] = done[key] = tensor.to(dtype)
            if not torch.equal(back := written[name].to(tensor.dtype), tensor):
                _refuse_overflow(name, tensor, back, dtype)
                num_rounded += 1
                lost += float((back.double() - tensor.double()).square().sum())
                held += float(tensor.double().square().sum())
    relative = (lost / held) ** 0.5 if held else 0.0
    return written, Rounding(dtype, num_rounded, num_floats, relative)


def _refuse_overflow(name: str, before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
    if not after.isfinite().all() and before.isfinite().all():
        raise UserError(
            f"{name} cannot be written in {str(dtype).removeprefix('torch.')}.",
            f"It holds values up to {float(before.abs().max()):.3g}, which are too large for it.",
            "Use dtype bfloat16 or float32.",
        )


def log_rounding(rounding: Rounding) -> None:
    """Log what rounding has changed, as a decision."""
    name = str(rounding.dtype).removeprefix("torch.")
    if rounding.num_rounded:
        log_decision(
            "export.rounding",
            f"{rounding.num_rounded} of {rounding.num_tensors} tensors rounded to {name}",
            f"by {rounding.relative:.1e} of their norm; --dtype float32 writes what was trained",
        )
