"""Variants of tiny models: several hidden states of the tower read, a tower of convolutions, a decoder of experts.

Data flow: folder of a tiny model -> another config -> random weights -> folder with the same processor.
"""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    EfficientNetConfig,
    FastVlmConfig,
    PreTrainedConfig,
    Qwen3VLMoeConfig,
)


def concatenating(model: Path, states: list[int], folder: Path) -> Path:
    """A folder with a model as that of ``model``, but whose connector reads these hidden states side by side."""
    config = AutoConfig.from_pretrained(model)
    config.vision_feature_layer = states
    return _written(config, model, folder)


def convolutional(model: Path, folder: Path) -> Path:
    """A folder with a FastVLM over EfficientNet: three blocks that change the shape, 16 tokens a picture."""
    llava = AutoConfig.from_pretrained(model)
    tower = EfficientNetConfig(
        image_size=28,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        in_channels=[32, 8, 16],
        out_channels=[8, 16, 24],
        kernel_sizes=[3, 3, 3],
        depthwise_padding=[2],  # that of 7 x 7 on both sides: 4 x 4 come out
        strides=[1, 2, 2],
        num_block_repeats=[1, 1, 1],
        expand_ratios=[1, 2, 2],
        hidden_dim=1280,  # of the uppermost convolution, which width_coefficient scales
        drop_connect_rate=0.0,
    )
    tower.hidden_size = tower.hidden_dim
    config = FastVlmConfig(
        vision_config=tower,
        text_config=llava.text_config,
        image_token_index=llava.image_token_index,
        image_seq_length=16,
    )
    return _written(config, model, folder)


def with_experts(model: Path, folder: Path) -> Path:
    """A folder with the mixture of experts of Qwen3-VL, as large as the Qwen3-VL of ``model``."""
    given = AutoConfig.from_pretrained(model).to_dict()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": []}
    names = ("model_type", "dtype", "architectures", "transformers_version")
    parts = {
        part: {name: value for name, value in given[part].items() if name not in names}
        for part in ("text_config", "vision_config")
    }
    tokens = {name: value for name, value in given.items() if name.endswith("_token_id")}
    text = {**parts["text_config"], **experts}
    return _written(Qwen3VLMoeConfig(text_config=text, vision_config=parts["vision_config"], **tokens), model, folder)


def _written(config: PreTrainedConfig, model: Path, folder: Path) -> Path:
    """A folder with random weights of a config, and all else of ``model``."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        if config.model_type == "fast_vlm":
            _keep_the_signal(made)
    made.save_pretrained(folder)
    return folder


def _keep_the_signal(model: nn.Module) -> None:
    """Fill convolutions and their norms so that a picture does not fade, as it does to 1e-34 otherwise."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
