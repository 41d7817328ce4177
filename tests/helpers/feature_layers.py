"""LLaVAs whose connector reads several hidden states of the tower, made of one that reads a single one.

Data flow: folder of a LLaVA -> config with a list of feature layers -> random weights -> folder.
"""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText


def concatenating(model: Path, states: list[int], folder: Path) -> Path:
    """A folder with a model as that of ``model``, but whose connector reads these hidden states side by side."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(model)
    config.vision_feature_layer = states
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    made.save_pretrained(folder)
    return folder
