"""Rows taken apart and put together again are the batch that the processor makes of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_mm.data.batch import Batch
from lightning_mm.data.collator import Collator
from lightning_mm.data.readers.conversations import read_conversations
from lightning_mm.execution.cache.collators import InseparableRowsError, is_pixels, merge_rows, split_row
from lightning_mm.models.processor import ModelProcessor
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
def test_rows_encoded_alone_make_the_batch_of_all(
    name: str, processing: Callable[[str], ModelProcessor], tmp_path: Path
) -> None:
    collator = Collator(processing(name))
    samples = read_conversations(make_uneven_rows(tmp_path)).samples
    pad = collator.processing.processor.tokenizer.pad_token_id
    same(merge_rows([split_row(collator([sample])) for sample in samples], samples, pad), collator(samples))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "internvl"])
def test_rows_without_a_picture_stand_beside_others(
    name: str, processing: Callable[[str], ModelProcessor], tmp_path: Path
) -> None:
    collator = Collator(processing(name))
    samples = read_conversations(make_uneven_rows(tmp_path, text_only=True)).samples
    pad = collator.processing.processor.tokenizer.pad_token_id
    rows = [split_row(collator([sample])) for sample in samples]
    same(merge_rows(rows, samples, pad), collator(samples))


def test_pictures_that_are_unevenly_dealt(processing: Callable[[str], ModelProcessor], tmp_path: Path) -> None:
    """Two rows, two pictures, both of the first row: in a batch, a tensor of two may be by row or by picture."""
    collator = Collator(processing("qwen2_5_vl"))
    samples = read_conversations(make_uneven_rows(tmp_path)).samples[:2]
    turn = dataclasses.replace(samples[0].turns[0], text="<image>" + samples[0].turns[0].text)
    rows = (
        dataclasses.replace(
            samples[0], images=samples[0].images + samples[1].images, turns=(turn, *samples[0].turns[1:])
        ),
        dataclasses.replace(
            samples[1],
            images=(),
            turns=(dataclasses.replace(samples[1].turns[0], text="What?"), *samples[1].turns[1:]),
        ),
    )
    pad = collator.processing.processor.tokenizer.pad_token_id
    whole = collator(rows)
    assert len(whole.inputs["image_grid_thw"]) == len(whole) == 2
    same(merge_rows([split_row(collator([row])) for row in rows], rows, pad), whole)


def test_what_cannot_be_taken_apart_is_refused(processing: Callable[[str], ModelProcessor], tmp_path: Path) -> None:
    collator = Collator(processing("mllama"))
    samples = read_conversations(make_uneven_rows(tmp_path)).samples[:2]
    row = collator(samples[:1])
    film = dataclasses.replace(samples[0], images=(), videos=samples[0].images)
    with pytest.raises(InseparableRowsError, match="video"):
        split_row(dataclasses.replace(row, samples=(film,)))
    record = split_row(row)
    wider = {
        name: value.repeat(1, 2, 1) if name == "row.aspect_ratio_mask" else value for name, value in record.items()
    }
    with pytest.raises(InseparableRowsError, match="aspect_ratio_mask"):
        merge_rows([record, wider], samples, 0)
