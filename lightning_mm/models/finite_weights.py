"""Weights that are not finite: found when a model is loaded, and named with the file that holds them.

Data flow: a loaded model -> one pass over its floating-point weights -> nothing, or a ``UserError`` with the tensors,
as the model and as the files call them.

500 MB of weights take about 0.1 s on one core, whatever their dtype; the files are read only where a tensor is at
fault.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_mm.core.errors import UserError

_NAMED = 3
"""Tensors that are named of those at fault."""


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity; waits for its device.

    Smallest and largest value tell both, NaN included, in one pass that allocates nothing; ``isfinite().all()`` takes
    ten times as long.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor.float() if tensor.element_size() == 1 else tensor  # 8-bit floats have no comparison
    return all(bool(end.isfinite()) for end in torch.aminmax(values.detach()))


def refuse_nonfinite_weights(model: nn.Module, path: str, revision: str | None = None) -> None:
    """Refuse a model that would give NaN at its first step.

    Args:
        model: As it was loaded; integers, such as packed quantized weights, are passed over.
        path: Folder or hub name that it was loaded from.
        revision: Commit, tag or branch of a hub model; None (default): the hub's default.

    Raises:
        UserError: A parameter is not finite.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if not is_finite(parameter)}
    if not found:
        return
    told = "; ".join(f"{name} has {_count(each)}" for name, each in list(found.items())[:_NAMED])
    where = "; ".join(f"{key} in {file}" for key, file in islice(_in_files(path, revision), _NAMED))
    if not where:
        raise UserError(
            f"model.backbone.path: {path} holds weights that are not finite in the dtype asked for.",
            f"{len(found)} of its tensors: {told}. Its files hold finite values, which overflow.",
            "Set model.backbone.dtype float32.",
        )
    raise UserError(
        f"model.backbone.path: {path} holds weights that are not finite.",
        f"{len(found)} of its tensors: {told}. In the files: {where}.",
        "Fetch the model again and compare its checksums, or take an earlier checkpoint of it.",
    )


def _count(tensor: Tensor) -> str:
    nan, every = int(tensor.isnan().sum()), int((~tensor.isfinite()).sum())
    kinds = {"NaN": nan, "infinite": every - nan}
    return " and ".join(f"{count} {kind}" for kind, count in kinds.items() if count) + f" of {tensor.numel()} values"


def _in_files(path: str, revision: str | None) -> Iterator[tuple[str, str]]:
    """Name of each tensor at fault and of its file, as they are on disk."""
    for file in sorted(_folder(path, revision).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (no mapping)
                if not is_finite(tensors.get_tensor(key)):
                    yield key, file.name


def _folder(path: str, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, local_files_only=True))
