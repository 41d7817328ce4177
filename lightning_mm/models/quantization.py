"""Optimizers with 8-bit states, by bitsandbytes.

Data flow: parameter groups -> optimizer. Weights are quantized by transformers, in ``loading``.
"""

from importlib.util import find_spec
from typing import Any

from torch.optim import Optimizer

from lightning_mm.core.errors import missing_package


def adamw_8bit(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    """AdamW with block-wise 8-bit moments (Dettmers et al. 2021, arXiv:2110.02861).

    Args:
        groups: Parameter groups, as of ``torch.optim.AdamW``.
        options: Keyword arguments of ``AdamW8bit``.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise missing_package("model.optimizer.name adamw8bit", "bitsandbytes")
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(groups, **options)
