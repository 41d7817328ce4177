"""Command line ``python -m lightning_mm.nano.data OUT [--stamps DIR] [--small]``: builds the nano data.

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
from lightning_mm.nano.data.tuxpaint import DEFAULT_FOLDER

log = logging.getLogger("lightning_mm")


def main(arguments: list[str] | None = None) -> int:
    """Build the data; returns the exit status, 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m lightning_mm.nano.data", description="Build the nano data.")
    parser.add_argument("out", type=Path, help="folder to make")
    stamps_help = f"Tux Paint stamps to draw from as well (default: {DEFAULT_FOLDER}, if there)"
    parser.add_argument("--stamps", type=Path, help=stamps_help)
    parser.add_argument("--small", action="store_true", help="far fewer pictures, for a first look")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=112, help="side of a picture in pixels")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    stamps = options.stamps
    if stamps is None and DEFAULT_FOLDER.is_dir():
        stamps = DEFAULT_FOLDER
        log_decision("nano_data.stamps", stamps, "installed on this machine")
    try:
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


if __name__ == "__main__":
    sys.exit(main())
