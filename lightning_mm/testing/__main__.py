"""Command line ``python -m lightning_mm.testing FOLDER``: a tiny random model, and data to try every verb with.

Data flow: options -> ``build_tiny`` (FOLDER/model) and ``build_tiny_data`` (FOLDER/train.json, val.json, probes.json);
or ``build_shape`` (FOLDER): a model of full size without weights, for ``plan``.
"""

import argparse
import sys
from pathlib import Path

from lightning_mm.core.errors import UserError
from lightning_mm.testing import FAMILIES, SHAPES, build_shape, build_tiny, build_tiny_data


def main(arguments: list[str] | None = None) -> int:
    """Write model and data; returns the exit status, 2 for an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m lightning_mm.testing", description="A tiny model and tiny data.")
    parser.add_argument("folder", type=Path, help="folder to make")
    parser.add_argument("--family", default="llava", help=f"one of {', '.join(FAMILIES)} (default: llava)")
    parser.add_argument("--layers", type=int, default=4, help="decoder blocks (default: 4)")
    parser.add_argument("--rows", type=int, default=16, help="training conversations (default: 16)")
    parser.add_argument("--shape", help=f"instead: one of {', '.join(SHAPES)} without weights, for lightning-mm plan")
    options = parser.parse_args(arguments)
    try:
        if options.shape is not None:
            folder = build_shape(options.shape, options.folder)
            lengths = "--image_tokens 576 --text_tokens 64 --supervised 16"
            recipe = f"-c models/{options.shape}.yaml -c trainer/gpu.yaml"
            print(f"lightning-mm plan {recipe} --model.backbone.path {folder} {lengths} --device h100")
            return 0
        model = build_tiny(options.family, options.folder / "model", layers=options.layers)
        build_tiny_data(options.folder, rows=options.rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"lightning-mm fit -c trainer/cpu.yaml --model.backbone.path {model} --data.train {options.folder}/train.json "
        f"--data.val {options.folder}/val.json --trainer.max_steps 4"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
