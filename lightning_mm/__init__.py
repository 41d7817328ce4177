"""lightning_mm: partial fine-tuning of multimodal LLMs, and a look inside while they train."""

__version__ = "0.1.0"
