"""Plans of published mixtures of experts, from configs of their sizes: on the meta device, without weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Glm4vMoeConfig, Llama4Config, Qwen3VLMoeConfig

from lightning_mm.data.batch import Batch
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone
from lightning_mm.planning.cost_estimate import MetaModel, RunSettings, estimate_cost
from lightning_mm.planning.devices import DEVICES
from lightning_mm.tuning import LoRA, LoRAOnMiddle
from lightning_mm.tuning.part_sizes import adapter_reach, weights_by_part
from tests.helpers.data import Data, Family, batch_of

Ids = dict[str, int]
H200 = DEVICES["h200"]


def qwen3_vl(ids: Ids) -> Any:
    """Qwen3-VL-30B-A3B, with the tiny processor's patches."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "rope_parameters": rope,
    }  # fmt: skip
    tower = {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 2048,
        "patch_size": 7, "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
    }  # fmt: skip
    return Qwen3VLMoeConfig(text_config=text, vision_config=tower, **ids)


def glm4v(ids: Ids) -> Any:
    """GLM-4.5V, with the tiny processor's patches."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}
    text = {
        "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
        "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "attention_bias": True, "rope_parameters": rope,
    }  # fmt: skip
    tower = {
        "depth": 24, "hidden_size": 1536, "intermediate_size": 10944, "num_heads": 12, "out_hidden_size": 4096,
        "patch_size": 7, "image_size": 336,
    }  # fmt: skip
    ends = {"image_start_token_id": ids["vision_start_token_id"], "image_end_token_id": ids["vision_end_token_id"]}
    tokens = {name: ids[name] for name in ("image_token_id", "video_token_id")}
    return Glm4vMoeConfig(text_config=text, vision_config=tower, **tokens, **ends)


def llama4(ids: Ids) -> Any:
    """Llama 4 Scout."""
    text = {
        "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
        "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "pad_token_id": 0,
    }  # fmt: skip
    tower = {
        "hidden_size": 1408, "intermediate_size": 5632, "num_hidden_layers": 34, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14, "vision_output_dim": 4096, "projector_input_dim": 4096,
        "projector_output_dim": 4096,
    }  # fmt: skip
    return Llama4Config(text_config=text, vision_config=tower, image_token_index=ids["image_token_id"])


def one_tile(batch: Batch, ids: Ids) -> Batch:
    """The first row with the picture as Llama 4 has it: a tile of 336 x 336 pixels, 144 tokens behind two others."""
    tokens = torch.cat([torch.full((1, 2), 9), torch.full((1, 144), ids["image_token_id"]), torch.full((1, 54), 9)], 1)
    regions = torch.ones_like(tokens, dtype=torch.uint8)
    regions[:, 2:146], regions[:, 180:] = 2, 3
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.zeros(1, 3, 336, 336, dtype=torch.bfloat16),
    }
    supervised = torch.arange(179, 199)
    return Batch(inputs, regions, supervised, tokens[0, 180:], batch.samples[:1])


PUBLISHED: dict[str, tuple[Callable[[Ids], Any], float, int, float]] = {
    # 48 layers of 128 experts of 2048 x 768; 30.5 B with the text model alone, 31.1 B in all.
    "Qwen3-VL-30B-A3B": (qwen3_vl, 31.1e9, 48 * 128 * 3 * 2048 * 768, 0.030),
    # 45 sparse layers of 128 experts of 4096 x 1408; 108 B.
    "GLM-4.5V": (glm4v, 108e9, 45 * 128 * 3 * 4096 * 1408, 0.0466),
    # 48 layers of 16 experts of 5120 x 8192; 109 B.
    "Llama-4-Scout": (llama4, 109e9, 48 * 16 * 3 * 5120 * 8192, 0.0286),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_mixture_is_counted_and_planned(name: str, family: Family, data: Data, tmp_path: Path) -> None:
    """Totals to 2%, as they are published rounded; experts exactly; bytes of weights and adapters to 0.1%."""
    config_of, total, experts, attention = PUBLISHED[name]
    plain = AutoConfig.from_pretrained(family("qwen3_vl")).to_dict()
    ids = {key: plain[key] for key in plain if key.endswith("_token_id") and isinstance(plain[key], int)}
    ids = {
        key: ids[key] for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    config_of(ids).save_pretrained(tmp_path / "config")
    batch = batch_of(family("qwen3_vl"), data)
    if name == "Llama-4-Scout":
        batch = one_tile(batch, ids)
    model = MetaModel(Backbone(str(tmp_path / "config"), dtype="bfloat16"), batch)
    mm = MultimodalModel(model._plain, model.layout)
    parts = weights_by_part(model.layout, mm.model.named_parameters())
    assert parts["experts"] == experts
    assert sum(p.numel() for p in mm.model.parameters()) == pytest.approx(total, rel=0.02)
    plan = LoRAOnMiddle(parts=["attention"]).plan(model.layout)
    assert adapter_reach(mm, plan) == pytest.approx(attention, abs=0.0005)

    found = estimate_cost(model, LoRAOnMiddle(lora=LoRA(r=8)), [batch], RunSettings(), H200)
    assert found.census.reach is not None
    assert found.census.reach > 0.99
    assert "router" in found.census.parts
    expected = 2 * sum(p.numel() for p in mm.model.parameters()) + 4 * found.census.trainable
    assert found.memory.weights == pytest.approx(expected, rel=1e-3)
    assert found.memory.gradients == 4 * found.census.trainable
    frozen = estimate_cost(model, replace(LoRAOnMiddle(), parts=["attention"]), [batch], RunSettings(), H200)
    assert frozen.flops.floor < found.flops.floor
