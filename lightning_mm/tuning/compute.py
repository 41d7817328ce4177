"""How a step is computed: what saves time or memory and leaves what is learned as it is, up to rounding.

Data flow: ``--model.compute.*`` -> ``Compute`` -> the module prepares the model by it, once, after it is frozen.
"""

from dataclasses import dataclass
from typing import Literal

from lightning_mm.errors import UserError
from lightning_mm.tuning.frozen import FrozenType


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How a step is computed.

    Args:
        packing: Decoder blocks see the tokens of all rows side by side, without padding.
        checkpoint_every: With activation checkpointing: of the blocks that backward crosses, every so many-th one is
            recomputed.
        loss_chunk: Answer tokens whose logits are in memory at a time; those of others are computed again in backward.
            'auto': all where their logits take up to 256 MiB, else as many as do; 'off': always all.
        frozen_dtype: What frozen weights of matrix products are held in; 'auto': bfloat16 under bf16-mixed, where
            autocast would make them so at every use and nothing else changes.
        compile: 'blocks' compiles the blocks that backward crosses, one by one.
        liger: Norms and gated MLPs by liger_kernel (CUDA only; the loss stays ours).
    """

    packing: bool = True
    checkpoint_every: int = 1
    loss_chunk: int | Literal["auto", "off"] = "auto"
    frozen_dtype: FrozenType = "auto"
    compile: Literal["off", "blocks"] = "off"
    liger: bool = False

    def __post_init__(self) -> None:
        for option in ("checkpoint_every", "loss_chunk"):
            value = getattr(self, option)
            if isinstance(value, int) and value < 1:
                raise UserError(
                    f"model.compute.{option}: {value} is out of range.", "It counts from 1.", "Give 1 or more."
                )
