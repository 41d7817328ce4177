"""How likely a model finds a text without pictures: what tuning has cost the language model.

Data flow: a text -> passages at even distances -> the model without a picture -> nats per token of each passage.

Shapes: B passages, L tokens, V vocabulary.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F

from lightning_mm.core.errors import UserError
from lightning_mm.models.attention.varlen import unpadded
from lightning_mm.training.module import MMModule

_BATCH = 4


def text_nats(
    module: MMModule, text: str, passages: int, tokens: int, autocast: AbstractContextManager[Any]
) -> list[float]:
    """Nats per token of each passage; the same passages for every model with this tokenizer.

    Args:
        module: A model that is loaded, in eval mode.
        text: Prose.
        passages: How many are read.
        tokens: Length of each.
        autocast: Context of the forward passes.

    Raises:
        UserError: The text is too short.
    """
    tokenizer: Any = module.mm.required_processor.processor.tokenizer
    begin = list(tokenizer("").input_ids)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    stride = len(ids) // passages
    if stride < tokens:
        raise UserError(
            f"text: {len(ids)} tokens are too few.",
            f"The study reads {passages} passages of {tokens}.",
            "Give a longer text, or lower text_chunks or text_tokens.",
        )
    rows = torch.tensor([begin + ids[n * stride : n * stride + tokens] for n in range(passages)])
    found: list[float] = []
    model: Any = module.mm.model
    with torch.no_grad(), autocast, unpadded(None):
        for part in rows.to(module.mm.device).split(_BATCH):
            logits_BLV = model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False).logits
            skip = max(len(begin), 1) - 1
            nll = F.cross_entropy(logits_BLV[:, skip:-1].float().transpose(1, 2), part[:, skip + 1 :], reduction="none")
            found += nll.mean(1).tolist()
    return found
