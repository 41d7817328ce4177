"""Datasets of Hugging Face's hub: their files, in its cache.

Data flow: name -> ``download_dataset`` (``huggingface_hub``; data files only, no code) -> the folder of the snapshot.
"""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lightning_mm.core.errors import UserError

_DATA = ("json", "jsonl", "ndjson", "csv", "tsv", "parquet", "arrow", "feather", "tar", "txt")
_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "mp4", "webm")
_PATTERNS = [
    "README.md", ".huggingface.yaml",
    *(f"*.{ending}{packed}" for ending in _DATA for packed in ("", ".gz", ".zst")),
    *(f"*.{ending}" for ending in _PICTURES),
]  # fmt: skip


def download_dataset(name: str, revision: str | None) -> Path:
    """The folder with the files of a dataset, from the cache of the hub where they are in it.

    Args:
        name: ``organization/name``.
        revision: Commit, tag or branch; None for the main branch.

    Raises:
        UserError: There is no such dataset, or it cannot be reached.
    """
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=_PATTERNS))
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated.", _short(error), "Ask for access on its page, then hf auth login."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name} has no revision {revision!r}.", _short(error), "Name a branch, tag or commit."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"No data file {name}, and no such dataset on Hugging Face's hub.",
            _short(error),
            "Check the name; paths are relative to the current folder, and private datasets need hf auth login.",
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"No data file {name}, and no dataset of this name can be downloaded from Hugging Face's hub.",
            _short(error),
            "Check the path; or download it where there is a network: hf download --repo-type dataset " + name,
        ) from error


def _short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]
