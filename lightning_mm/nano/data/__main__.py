"""Command line ``python -m lightning_mm.nano.data OUT [--stamps [DIR]] [--small]``: builds the nano data.

Data flow: options -> ``build_nano_data``; counts per split, the folder and decisions are logged.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.nano.data import SMALL, build_nano_data
from lightning_mm.nano.data.build import IMAGE_SIZE
from lightning_mm.nano.data.packages import FETCH, stamps_folder
from lightning_mm.nano.data.tuxpaint import DEFAULT_FOLDER

log = logging.getLogger("lightning_mm")
_ANY = Path("any")


def main(arguments: list[str] | None = None) -> int:
    """Build the data; returns the exit status, 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m lightning_mm.nano.data", description="Build the nano data.")
    parser.add_argument("out", type=Path, help="folder to make")
    stamps_help = "draw from the Tux Paint stamps as well; without a folder, those installed or fetched"
    parser.add_argument("--stamps", nargs="?", type=Path, const=_ANY, help=stamps_help)
    parser.add_argument("--small", action="store_true", help="far fewer pictures, for a first look")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE, help="side of a picture in pixels")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        stamps = _stamps(options.stamps)
        sizes = SMALL if options.small else None
        out = build_nano_data(options.out, seed=options.seed, image_size=options.image_size, sizes=sizes, stamps=stamps)
    except UserError as error:
        log.error("%s", error)
        return 2
    counts = json.loads((out / "manifest.json").read_text("utf-8"))["counts"]
    for split, count in counts.items():
        log.info("%s: %d pictures, %d questions", split, count["pictures"], count["questions"])
    log.info("%s", out)
    return 0


def _stamps(asked: Path | None) -> Path | None:
    """The folder of stamps to draw from."""
    if asked is None:
        log_decision("nano_data.stamps", "left out", "they are used where --stamps is given")
        return None
    if asked != _ANY:
        return asked
    found = next((folder for folder in (DEFAULT_FOLDER, stamps_folder()) if folder and folder.is_dir()), None)
    if found is None:
        why = f"There is no {DEFAULT_FOLDER}, and none were fetched."
        raise UserError("There are no Tux Paint stamps.", why, f"Run: {FETCH} --stamps")
    log_decision("nano_data.stamps", found, "found on this machine")
    return found


if __name__ == "__main__":
    sys.exit(main())
