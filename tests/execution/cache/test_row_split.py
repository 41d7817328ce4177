"""Rows taken apart and put together again are the batch that the processor makes of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_mm.data.batch import Batch
from lightning_mm.data.collator import Collator
from lightning_mm.data.readers.conversations import read_conversations
from lightning_mm.execution.cache.collators import Inseparable, cut, is_pixels, joined
from lightning_mm.models.processor import Processing
from lightning_mm.testing.tiny import FAMILIES
from tests.helpers.data import make_uneven_rows


def same(found: Batch, expected: Batch) -> None:
    inputs = {name: value for name, value in expected.inputs.items() if not is_pixels(name, value)}
    assert found.inputs.keys() == inputs.keys()
    for name, value in inputs.items():
        if value.ndim > 2 and value.shape[:2] == expected.regions.shape:  # mllama's mask says something of padding too
            assert torch.equal(found.inputs[name].flatten(0, 1)[found.real], value.flatten(0, 1)[expected.real]), name
        else:
            assert torch.equal(found.inputs[name], value), name
    for field in ("regions", "supervised", "targets"):
        assert torch.equal(getattr(found, field), getattr(expected, field)), field
    assert found.samples == expected.samples


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_rows_of_two_batches_make_the_batch_of_all(
    name: str, processing: Callable[[str], Processing], tmp_path: Path
) -> None:
    collator = Collator(processing(name))
    samples = read_conversations(make_uneven_rows(tmp_path)).samples
    first, second = collator(samples[:3]), collator(samples[3:])
    pad = collator.processing.processor.tokenizer.pad_token_id
    same(joined([*cut(first), *cut(second)], samples, pad), collator(samples))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "internvl"])
def test_rows_without_a_picture_stand_beside_others(
    name: str, processing: Callable[[str], Processing], tmp_path: Path
) -> None:
    collator = Collator(processing(name))
    samples = read_conversations(make_uneven_rows(tmp_path, text_only=True)).samples
    pad = collator.processing.processor.tokenizer.pad_token_id
    rows = [cut(collator([sample]))[0] for sample in samples]
    same(joined(rows, samples, pad), collator(samples))


def test_rows_that_cannot_be_told_apart_are_refused(processing: Callable[[str], Processing], tmp_path: Path) -> None:
    """Two rows, two pictures, both of the first row: a tensor of two may be by row or by picture."""
    collator = Collator(processing("qwen2_5_vl"))
    samples = read_conversations(make_uneven_rows(tmp_path)).samples[:2]
    batch = collator(samples)
    moved = (
        dataclasses.replace(samples[0], images=samples[0].images + samples[1].images),
        dataclasses.replace(samples[1], images=()),
    )
    with pytest.raises(Inseparable, match="image_grid_thw"):
        cut(dataclasses.replace(batch, samples=moved))
