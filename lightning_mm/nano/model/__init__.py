"""The nano model: DINOv2 ViT-S/14 and SmolLM2-135M joined as a LLaVA."""
