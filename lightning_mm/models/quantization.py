"""bitsandbytes: optimizers with 8-bit states.

Data flow: parameter groups -> optimizer. Quantized weights are asked of transformers in ``loading``.
"""

from typing import Any

from torch.optim import Optimizer


def adamw_8bit(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    """AdamW whose moments are held in 8 bits, block by block (2110.02861)."""
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(groups, **options)
