"""Batches of a user's own DataLoader: what a processor of transformers returns, with labels, becomes a ``Batch``.

Data flow: mapping of tensors (``input_ids``, ``labels``, ``pixel_values``, ...) -> checked -> ``Batch``.

Shapes: B rows, L tokens after padding, S supervised positions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch, PromptBatch, TokenRegion
from lightning_mm.data.sample import Sample
from lightning_mm.models.processor import ModelProcessor

_IGNORED = -100
"""Label of a token that is not to be learned, as in transformers."""


def as_batch(batch: Any, processing: ModelProcessor) -> Batch | PromptBatch:
    """A batch of any loader as one of ours.

    Raises:
        UserError: It is neither a batch of ours nor a mapping, or the mapping cannot be trained on.
    """
    if isinstance(batch, (Batch, PromptBatch)):
        return batch
    if isinstance(batch, Mapping):
        return batch_of_inputs(batch, processing)
    raise UserError(
        f"A batch is a {type(batch).__name__}.",
        "A batch is what a processor returns, with labels, or what MMDataModule makes.",
        "Let the loader's collate_fn give processor(...) with labels.",
    )


def batch_of_inputs(inputs: Mapping[str, Any], processing: ModelProcessor) -> Batch:
    """The batch of a processor's outputs and labels; its loss is transformers' own, times the supervised tokens.

    Args:
        inputs: ``input_ids`` and ``labels`` (B, L), where a label of -100 is not learned, as transformers has it (the
            shift by one is made here); ``attention_mask`` (B, L), right-padded; tensors of the images.
        processing: The model's processor.

    Raises:
        UserError: Labels are missing or on padding, or rows are padded on the left.
    """
    for name in ("input_ids", "labels"):
        if not isinstance(inputs.get(name), Tensor) or inputs[name].dim() != 2:
            raise UserError(
                f"The batch has no {name}.",
                f"It has {', '.join(map(str, inputs)) or 'nothing'}; {name} are a tensor of (rows, tokens).",
                "Let the loader give processor(...) with labels, or use MMDataModule.",
            )
    labels, known = inputs["labels"], processing.forward_names - {"labels"}
    if left_out := sorted(name for name in inputs if name not in {*known, "labels"}):
        log_decision("train_dataloaders", f"{', '.join(left_out)} not used", "the model's forward does not take it")
    kept = {name: value for name, value in inputs.items() if name in known and isinstance(value, Tensor)}
    mask = kept.get("attention_mask", torch.ones_like(labels))
    _check_padding(mask, labels)
    regions = torch.full(labels.shape, TokenRegion.PROMPT, dtype=torch.uint8, device=labels.device)
    images = torch.isin(kept["input_ids"], torch.tensor(processing.image_token_ids, device=labels.device))
    regions[images] = TokenRegion.IMAGE
    regions[mask == 0] = TokenRegion.PAD
    learned = labels != _IGNORED
    learned[:, 0] = False  # nothing stands before the first token to predict it from
    regions[learned] = TokenRegion.ANSWER
    answered = learned.flatten().nonzero().squeeze(1)
    samples = tuple(_stand_in(row, bool(seen)) for row, seen in enumerate(images.any(1).tolist()))
    return Batch(kept, regions, answered - 1, labels.flatten()[answered], samples)


def _check_padding(mask: Tensor, labels: Tensor) -> None:
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise UserError(
            "The batch is padded on the left.",
            "Positions are counted from the first token of a row.",
            'Set processor.tokenizer.padding_side = "right".',
        )
    if bool(((mask == 0) & (labels != _IGNORED)).any()):
        raise UserError(
            "Labels of the batch are on padding.",
            "The model would learn to write padding.",
            "Set labels[attention_mask == 0] = -100.",
        )


def _stand_in(row: int, has_image: bool) -> Sample:
    """A sample without text: a batch of tensors says of its rows only whether they have an image."""
    return Sample(str(row), (), (Path("image"),) if has_image else (), origin=f"row {row}")
