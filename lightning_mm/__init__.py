"""lightning_mm: partial fine-tuning of multimodal LLMs with PyTorch Lightning, and analysis of every layer.

The version below is the only one: package metadata is built from it.
"""

__version__ = "0.1.0"
