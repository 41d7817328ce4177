"""Hidden states of all tokens into one vector per site, inside the hook, so that only pooled vectors are kept.

Data flow: (B, L, D) of one layer + pooling weights of the batch -> (B, S, D) float32.

Shapes: B rows, L tokens, D hidden size, S sites per row (last token, mean of the image's tokens, ...).
"""

import torch
from torch import Tensor

from lightning_mm.errors import UserError
from lightning_mm.geometry.gram import exact_products


def pool(hidden_BLD: Tensor, weights_BSL: Tensor) -> Tensor:
    """Weighted means over tokens, in float32 whatever the model computes in.

    A token that no site reads may hold anything, NaN too (rows of padding are undefined under some attention kernels).

    Args:
        hidden_BLD: A layer's hidden states, of any floating type.
        weights_BSL: Row-normalised weights; all zero where a row has no such site.

    Returns:
        (B, S, D) float32. A site of one token is that token's vector, exactly.

    Raises:
        UserError: The hidden states are not one vector per token of each row.

    Example:
        >>> pool(torch.tensor([[[1.0], [3.0], [float("nan")]]]), torch.tensor([[[0.5, 0.5, 0.0]]])).item()
        2.0
    """
    batch, length = weights_BSL.shape[0], weights_BSL.shape[2]
    if hidden_BLD.ndim != 3 or hidden_BLD.shape[:2] != (batch, length):
        raise UserError(
            "The decoder's hidden states cannot be read.",
            f"A block gives {tuple(hidden_BLD.shape)} for {batch} rows of {length} tokens, not one vector per token.",
            "Models with several streams per token (Gemma 3n) cannot be looked into; take the callbacks off.",
        )
    read_BL = weights_BSL.ne(0).any(1)
    used_BLD = torch.where(read_BL[:, :, None], hidden_BLD.detach().float(), 0.0)
    with exact_products():
        return weights_BSL.float() @ used_BLD
