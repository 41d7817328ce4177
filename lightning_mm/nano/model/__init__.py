"""The nano model: DINOv2 ViT-S/14 and SmolLM2-135M joined as a LLaVA."""

from lightning_mm.nano.model.build import build_nano_model

__all__ = ["build_nano_model"]
