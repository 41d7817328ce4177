"""The folder of one identity: records of different identities never meet.

Data flow: JSON values -> SHA-256 -> ``root/<digest>/``, with ``identity.json`` that says what it is.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def folder_of(root: Path, identity: Mapping[str, Any]) -> Path:
    """Where the records of ``identity`` lie."""
    canonical = json.dumps(identity, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return root / hashlib.sha256(canonical.encode()).hexdigest()[:32]


def make(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder, and write into it what it is.

    Raises:
        OSError: That cannot be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "identity.json"
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(identity, indent=2, sort_keys=True), encoding="utf-8")
        temporary.replace(path)
