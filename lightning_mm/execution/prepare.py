"""Prepare a model for training steps: techniques that save time or memory and do not change what is learned.

Data flow: ``--model.compute.*`` -> ``Compute``; a frozen, adapted model and its plan -> ``apply_techniques``, in a
fixed order -> the same model, and an ``ExitStack`` that undoes the techniques in reverse order.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from lightning_mm.core.choices import refuse_other_choices
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.execution.activation_checkpointing import blocks_in_graph, checkpoint_blocks
from lightning_mm.execution.frozen_dtype import FrozenDtype, cast_frozen_weights
from lightning_mm.models.attention.cpu_kernels import use_cpu_attention
from lightning_mm.models.attention.varlen import unpad_blocks
from lightning_mm.models.compile import apply_liger, compile_blocks
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.rms_norm_cpu import use_cpu_norms
from lightning_mm.tuning.policy import TuningPlan


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How a step is computed.

    Args:
        packing: Decoder blocks see the tokens of all rows side by side, without padding; a proof on rows of the run
            leaves out the blocks that this would change.
        cpu_kernels: Attention and norms by our own kernels on CPUs, where gradients flow.
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
    cpu_kernels: bool = True
    checkpoint_every: int = 1
    loss_chunk: int | Literal["auto", "off"] = "auto"
    frozen_dtype: FrozenDtype = "auto"
    compile: Literal["off", "blocks"] = "off"
    liger: bool = False

    def __post_init__(self) -> None:
        refuse_other_choices(self, "model.compute")
        for option in ("checkpoint_every", "loss_chunk"):
            value = getattr(self, option)
            if isinstance(value, int) and value < 1:
                raise UserError(
                    f"model.compute.{option}: {value} is out of range.", "It counts from 1.", "Give 1 or more."
                )


def apply_techniques(
    mm: MultimodalModel, plan: TuningPlan, compute: Compute, checkpointing: bool, precision: str | None = None
) -> ExitStack:
    """Prepare a model for training steps, in place.

    The order matters: a later technique wraps the earlier ones.

    1. Frozen weights are cast to the dtype that autocast would use (undone for the head's forward only).
    2. Liger's kernels replace norms and gated MLPs (not undone: Liger cannot be removed again).
    3. Blocks are compiled; the techniques below stay outside of the compiled code.
    4. CPU attention replaces sdpa where gradients flow.
    5. CPU norms replace RMS norms where gradients flow.
    6. Blocks leave out padding: around 4, which decides how rows are computed.
    7. Blocks are recomputed in backward: around all others, so that recomputation repeats them.

    ``TrainingStep.open_cache`` later skips vision blocks whose output nothing reads, on the same stack.

    Args:
        mm: The model, frozen and adapted as planned.
        plan: Which weights train.
        compute: Settings of the computation.
        checkpointing: Whether blocks are recomputed in backward.
        precision: ``trainer.precision``; None (default) outside of a run: frozen weights keep their dtype.

    Returns:
        Closing it puts back the forward of every module that 1 and 3 to 7 replaced, the last technique first.
    """
    with ExitStack() as undo:  # closed here only if a technique fails
        if precision is not None:
            cast_frozen_weights(mm, plan, precision, undo, compute.frozen_dtype)
        if compute.liger:
            apply_liger(mm.model)
        if compute.compile == "blocks":
            compile_blocks(mm.model, blocks_in_graph(mm, plan), undo)
        if compute.cpu_kernels:
            use_cpu_attention(mm.model, undo)
            use_cpu_norms(mm.model, undo)
        if compute.packing:
            packed = unpad_blocks(mm, undo)
            why = "attention alone is computed in rows" if packed else "no block's attention can be put back into rows"
            log_decision(
                "model.compute.packing", f"{len(packed)} of {mm.layout.num_layers} blocks without padding", why
            )
        if checkpointing:
            blocks = blocks_in_graph(mm, plan)[:: compute.checkpoint_every]
            checkpoint_blocks(mm.model, blocks, undo)
            log_decision(
                "model.activation_checkpointing", f"{len(blocks)} blocks", "only those that backward crosses anyway"
            )
        return undo.pop_all()
