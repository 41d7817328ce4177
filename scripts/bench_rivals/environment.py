"""The rivals' own environment, with the versions they are compared at.

Data flow: VERSIONS -> ``.venv-rivals`` -> its Python. Torch goes in first and alone, as in ``setup.sh``.
"""

import subprocess
import sys
from pathlib import Path

VERSIONS = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "pillow": "13.0.0",
}


def rivals_python(folder: Path) -> Path:
    """The Python of the rivals' environment, which is made if it is not there or has other versions."""
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = "\n".join(f"{name}=={version}" for name, version in VERSIONS.items())
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing into {folder} (once)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    torch, *others = wanted.splitlines()
    for packages in ([torch], others):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python
