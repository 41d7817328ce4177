"""Checkpoint files: written whole or not at all, and refused if a byte of them has changed.

Data flow: checkpoint -> is there room -> a file beside the old one, renamed over it (``CheckpointFile``); file -> the
checksum of each of its records -> ``read_checkpoint``.

A checkpoint is a zip archive of torch, which holds a CRC-32 of every record; torch does not look at them.
"""

import errno
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fsspec.utils import get_protocol
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import replaced_file

KEY = "lightning_mm"
"""Entry of a checkpoint that is ours."""
FORMAT = 2
"""Version of what is in that entry."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SMALL = 1 << 20
"""Bytes of a checkpoint beside its tensors."""


class CheckpointFile(TorchCheckpointIO):
    """Checkpoints on disks of this machine, which a kill, a full disk or a power cut leave whole.

    The new file lies beside the old one until it is complete, whatever the folder for temporary files is, and is never
    held in memory. Paths of remote stores are written as Lightning does.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, replacing one that exists.

        Raises:
            UserError: Its disk is full; a checkpoint that was there still is, whole.
        """
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(target, checkpoint)
        try:
            with replaced_file(target) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # When writing fails, torch closes its archive all the same, and raises a second error over the first.
            first = error if isinstance(error, OSError) else error.__context__
            if isinstance(first, OSError) and first.errno in _FULL:
                raise _no_space(target, str(first)) from error
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint at ``path``, once its checksums are found right.

        Raises:
            UserError: A record has changed since it was written.
        """
        if _is_local(path) and Path(path).is_file():
            try:
                _check_records(Path(path))
            except zipfile.BadZipFile as error:
                raise _damaged(Path(path), error) from error
        return super().load_checkpoint(path, map_location, weights_only)


class LoadedCheckpoint(CheckpointFile):
    """Checkpoint IO that returns an already loaded checkpoint instead of reading it again.

    Args:
        path: Where the checkpoint was read from; other paths are read as usual.
        checkpoint: Its content; released once the trainer has loaded it.
    """

    def __init__(self, path: Path, checkpoint: dict[str, Any]) -> None:
        super().__init__()
        self._path, self._checkpoint = path.absolute(), checkpoint

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint at ``path``."""
        if Path(path).absolute() == self._path and self._checkpoint:
            checkpoint, self._checkpoint = self._checkpoint, {}
            return checkpoint
        return super().load_checkpoint(path, map_location, weights_only)


def read_checkpoint(path: Path, mapped: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, read on the CPU with ``weights_only=True``.

    Args:
        path: The checkpoint file.
        mapped: Memory-map the tensors; default True. A run that resumes needs False: its own saving may replace the
            file.

    Raises:
        UserError: The file is missing, damaged, contains code, was not written by lightning_mm, or by a later version.
    """
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.ckpt"))
        raise UserError(
            f"There is no checkpoint {path}.", f"Beside it: {', '.join(near) or 'none'}.", "Name one of them."
        )
    try:
        _check_records(path)
        checkpoint = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(KEY), dict):
        raise UserError(f"{path} is no checkpoint of lightning_mm.", f"It has no '{KEY}' entry.", "Name another file.")
    check_format(checkpoint[KEY])
    return checkpoint


def check_format(saved: Mapping[str, Any]) -> None:
    """Refuse what a later version wrote.

    Args:
        saved: Our entry of a checkpoint.

    Raises:
        UserError: Its format is later than ``FORMAT``.
    """
    if (version := saved.get("version", 0)) > FORMAT:
        raise UserError(
            "The checkpoint was written by a later version of lightning_mm.",
            f"Its format is {version}; this version knows formats up to {FORMAT}.",
            "Install the version that wrote it.",
        )


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"The checkpoint {path} cannot be read.",
        (str(error) or type(error).__name__).splitlines()[0],
        "It is damaged, or holds code, which is never run; use an earlier one.",
    )


def _check_records(path: Path) -> None:
    """Compare the checksum of each record of a checkpoint; a file that is no archive is left to torch."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} does not have the checksum that it was written with.")


def _check_space(target: Path, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to begin a file that its disk has no room for."""
    needed, free = _tensor_bytes(checkpoint) + _SMALL, shutil.disk_usage(target.parent).free
    if free < needed:
        raise _no_space(
            target, f"It takes {needed / 2**20:,.0f} MiB beside the one before; {free / 2**20:,.0f} are free."
        )


def _no_space(target: Path, why: str) -> UserError:
    kept = f"{target.name} of an earlier step is whole. " if target.is_file() else ""
    return UserError(
        f"The disk of {target.parent} is full: {target.name} was not saved.", why, f"{kept}Free some space."
    )


def _tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers; one that is there twice counts twice."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _is_local(path: str | Path) -> bool:
    return get_protocol(str(path)) in ("file", "local")
