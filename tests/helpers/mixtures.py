"""Tiny random models with mixtures of experts, and with mixers, of transformers' own classes.

Data flow: name -> config of small sizes -> model in memory; ``mixture_folder`` writes Qwen3-VL's with the processor of
its dense sibling.

Shapes: D hidden size 32, E 4 experts, 2 of them per token, F inner size 16 of each expert.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Ernie4_5_VLMoeConfig,
    Glm4vMoeConfig,
    InternVLConfig,
    Lfm2VlConfig,
    Llama4Config,
    Qwen3_5MoeConfig,
    Qwen3VLMoeConfig,
)

WIDTH, EXPERTS, INNER = 32, 4, 16
_TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_hidden_layers": 2,
}  # fmt: skip
_MIXTURE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": INNER}
_TOWER: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 7, "out_hidden_size": WIDTH
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}


def _qwen3_vl_moe() -> Any:
    text = {**_TEXT, **_MIXTURE, "num_experts": EXPERTS, "rope_parameters": {**_ROPE, "mrope_interleaved": True}}
    tower = {**_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLMoeConfig(text_config=text, vision_config=tower)


def _qwen3_5_moe() -> Any:
    rope = {**_ROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    text = {
        **_TEXT, **_MIXTURE, "num_experts": EXPERTS, "shared_expert_intermediate_size": INNER, "rope_parameters": rope,
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }  # fmt: skip
    return Qwen3_5MoeConfig(text_config=text, vision_config={**_TOWER, "num_position_embeddings": 16})


def _glm4v_moe() -> Any:
    text = {
        **_TEXT, **_MIXTURE, "n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0},
    }  # fmt: skip
    return Glm4vMoeConfig(text_config=text, vision_config={**_TOWER, "image_size": 28})


def _llama4() -> Any:
    text = {
        **_TEXT, "intermediate_size": INNER, "intermediate_size_mlp": 48, "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 64,
    }  # fmt: skip
    tower = {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 7, "vision_output_dim": 32, "projector_input_dim": 32,
        "projector_output_dim": 32,
    }  # fmt: skip
    return Llama4Config(text_config=text, vision_config=tower)


def _ernie() -> Any:
    text = {
        **_TEXT, "moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": [INNER, INNER // 2],
        "moe_num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"],
        "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    return Ernie4_5_VLMoeConfig(text_config=text, vision_config={**_TOWER, "hidden_act": "quick_gelu"})


def _internvl() -> Any:
    text = {**_TEXT, **_MIXTURE, "model_type": "qwen3_moe", "num_experts": EXPERTS}
    tower = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": [28, 28], "patch_size": [7, 7],
    }  # fmt: skip
    return InternVLConfig(text_config=text, vision_config=tower, image_token_id=5)


def _lfm2_vl() -> Any:
    text = {**_TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_ff_dim": 48}
    tower = {
        "model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "patch_size": 7, "num_patches": 16,
    }  # fmt: skip
    return Lfm2VlConfig(text_config=text, vision_config=tower)


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_5_moe": _qwen3_5_moe,
    "glm4v_moe": _glm4v_moe,
    "llama4": _llama4,
    "ernie4_5_vl_moe": _ernie,
    "internvl": _internvl,
    "lfm2_vl": _lfm2_vl,
}
"""Configs by name; two decoder blocks each."""


def build(name: str) -> Any:
    """A tiny random model in eval mode, float32."""
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(MODELS[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # some families leave experts and routers unset or at zero
                parameter.normal_(std=0.2)
    return model.eval()


def mixture_folder(dense: Path, folder: Path, layers: int = 4) -> Path:
    """A folder of a tiny Qwen3-VL with experts.

    Args:
        dense: Folder of the tiny Qwen3-VL, whose sizes and processor are taken over.
        folder: Folder to create.
        layers: Decoder blocks.
    """
    plain = AutoConfig.from_pretrained(dense).to_dict()
    text, tower = (
        {k: v for k, v in plain[name].items() if k != "model_type"} for name in ("text_config", "vision_config")
    )
    text |= {**_MIXTURE, "num_experts": EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []}
    text["num_hidden_layers"] = layers
    tokens = {n: plain[n] for n in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=tower, **tokens)
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = plain["text_config"].get("eos_token_id")
    own = shutil.ignore_patterns("config.json", "generation_config.json", "*.safetensors")
    shutil.copytree(dense, folder, ignore=own)
    model.save_pretrained(folder)
    return folder
