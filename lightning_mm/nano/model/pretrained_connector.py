"""The connector that a first stage left, shipped with the package: reading it, and writing it anew.

Two files beside this one: ``connector.safetensors`` (the weights, bfloat16) and ``connector.json`` (their SHA-256, the
model that they fit, and how they were made). ``scripts/nano_connector.sh`` remakes both.

Data flow: exported model + folder of its run -> ``write_connector`` -> the two files -> ``read_connector`` (checksum,
recipe, shapes) -> ``build``. Command line: ``python -m lightning_mm.nano.model.pretrained_connector EXPORT RUN``.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_json
from lightning_mm.nano.model.join import CONNECTOR_PREFIX, MANIFEST, Recipe

ConnectorSource = Literal["new", "pretrained"]
PACKAGE = Path(__file__).parent
WEIGHTS, PROVENANCE = "connector.safetensors", "connector.json"
_REMAKE = "bash scripts/nano_connector.sh"


def read_connector(recipe: Recipe, folder: Path = PACKAGE) -> tuple[str, dict[str, Tensor]]:
    """SHA-256 of the shipped weights, and the weights in float32.

    Args:
        recipe: The model that they are for; image size, hidden states and version must be those they were trained with.
        folder: Where the two files are.

    Raises:
        UserError: The files are missing or altered, or were made for another recipe.
    """
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            "connector=pretrained: this installation has no trained connector.",
            f"{error.filename} is missing.",
            f"Use --connector new, or train one: {_REMAKE}",
        ) from error
    if digest != provenance["sha256"]:
        why = f"Its sha256 is {digest}, expected {provenance['sha256']}."
        raise UserError(f"{folder / WEIGHTS} is not the file that was trained.", why, "Install the package again.")
    if provenance["fits"] != _fits(recipe):
        raise UserError(
            "connector=pretrained does not fit this model.",
            f"It was trained for {provenance['fits']}, this is {_fits(recipe)}.",
            f"Leave these options at their defaults, use --connector new, or train one: {_REMAKE}",
        )
    return digest, {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}


def write_connector(export: Path, run: Path, folder: Path = PACKAGE) -> Path:
    """Write the connector of an exported nano model, and how it was made; returns the file of the weights.

    Args:
        export: Folder of the exported model.
        run: Folder of the run that trained it; its ``config.yaml`` names the nano model that it began with.
        folder: Where the two files go.

    Raises:
        UserError: A folder is not what it should be.
    """
    config = yaml.safe_load(_text(run / "config.yaml"))
    built = json.loads(_text(Path(config["model"]["backbone"]["path"]) / MANIFEST))["recipe"]
    recipe = Recipe(**{**built, "vision_feature_layer": tuple(built["vision_feature_layer"])})
    weights = {
        name.removeprefix(CONNECTOR_PREFIX): value.to(torch.bfloat16).contiguous()
        for file in sorted(export.glob("*.safetensors"))
        for name, value in load_file(file).items()
        if name.startswith(CONNECTOR_PREFIX)
    }
    if not weights:
        raise UserError(f"{export} holds no connector.", f"No tensor begins with {CONNECTOR_PREFIX}.", "Export a run.")
    save_file(weights, folder / WEIGHTS)
    provenance = {
        "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        "fits": _fits(recipe),
        "shapes": {name: list(value.shape) for name, value in weights.items()},
        "license": "Apache-2.0",
        "remade_by": _REMAKE,
        "trained": {
            "seed": config.get("seed_everything"),
            "started_from": {"connector": recipe.connector, "seed": recipe.seed},
            **{part: config.get(part) for part in ("model", "data", "trainer")},
        },
        "versions": {name: version(name) for name in ("lightning-mm", "torch", "transformers")},
    }
    write_json(folder / PROVENANCE, provenance)
    return folder / WEIGHTS


def _fits(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides which connector fits."""
    return {
        "image_size": recipe.image_size,
        "vision_feature_layer": list(recipe.vision_feature_layer),
        "version": recipe.version,
    }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read.", str(error), f"Make it by: {_REMAKE}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the two files; returns the exit status, 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_mm.nano.model.pretrained_connector",
        description="Keep the connector of an exported nano model as the one that is shipped.",
    )
    parser.add_argument("export", type=Path, help="folder of the exported model")
    parser.add_argument("run", type=Path, help="folder of the run that trained it")
    parser.add_argument("--out", type=Path, default=PACKAGE, help="folder of the two files (default: this package)")
    options = parser.parse_args(arguments)
    try:
        print(write_connector(options.export, options.run, options.out))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
