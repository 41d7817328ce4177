"""Token lengths are measured once, and again where what they depend on is another."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from lightning_mm.data import stored_lengths
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.row_table import RowTable
from lightning_mm.data.split import SplitOptions, open_split
from lightning_mm.data.stored_lengths import longest_needed, stored_token_lengths
from lightning_mm.data.token_lengths import TokenLengths, measure_token_lengths
from lightning_mm.models.pixel_bounds import PixelBounds
from lightning_mm.models.processor import ModelProcessor, load_processor
from tests.helpers.data import Data, Family, make_rows

Load = Callable[[str], ModelProcessor]


def table_of(folder: Path) -> RowTable:
    return open_split("train", str(folder / "train.json"), SplitOptions(), RejectedSamples()).samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.json").write_text(json.dumps(make_rows(tmp_path, 6)))
    return tmp_path


def test_a_second_start_measures_nothing(folder: Path, processing: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    made, table = processing("qwen2_5_vl"), table_of(folder)
    first = stored_token_lengths(table, made, folder)
    expected = measure_token_lengths(table, made)
    assert torch.equal(first.tokens, expected.tokens)
    assert torch.equal(first.vision, expected.vision)
    monkeypatch.setattr(stored_lengths, "measure_token_lengths", None)
    again = stored_token_lengths(table_of(folder), processing("qwen2_5_vl"), folder)
    assert torch.equal(again.tokens, first.tokens)
    assert torch.equal(again.vision, first.vision)
    assert again.digest == first.digest


@pytest.mark.parametrize("change", ["rows", "picture", "processor", "template", "bounds"])
def test_another_table_or_processor_is_measured(change: str, folder: Path, processing: Load) -> None:
    made, table = processing("qwen2_5_vl"), table_of(folder)
    before = stored_token_lengths(table, made, folder)
    if change == "rows":
        table = table[:4]
    elif change == "picture":
        Image.new("RGB", (400, 400)).save(folder / "picture-0-0.png")
        table = table_of(folder)
    elif change == "processor":
        made = processing("llava")
    elif change == "template":
        made.template = made.template.replace("You are a helpful assistant", "You are")
    else:
        made.bound_pixels(PixelBounds(None, 28 * 28))
    after = stored_token_lengths(table, made, folder)
    assert len(list((folder / "lengths").iterdir())) == 2
    assert torch.equal(after.tokens, measure_token_lengths(table, made).tokens)
    assert not torch.equal(after.tokens, before.tokens)


def test_a_broken_file_is_made_anew(folder: Path, processing: Load) -> None:
    made, table = processing("llava"), table_of(folder)
    first = stored_token_lengths(table, made, folder)
    (file,) = (folder / "lengths").iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    assert torch.equal(stored_token_lengths(table, made, folder).tokens, first.tokens)
    assert torch.equal(stored_token_lengths(table, made, folder).tokens, first.tokens)


def test_the_longest_row_within_the_context() -> None:
    lengths = TokenLengths(torch.tensor([5, 90, 30]), torch.zeros(3, dtype=torch.float64))
    assert longest_needed(lengths, None) == 90
    assert longest_needed(lengths, 90) == 90
    assert longest_needed(lengths, 89) == 89
    assert longest_needed(replace(lengths, tokens=torch.tensor([7])), 4096) == 7


def test_auto_cuts_no_row_of_any_batch(family: Family, data: Data) -> None:
    """With and without batches by length, which take their lengths from the same measure."""
    options = {"train": str(data["train"]), "processor": str(family("llava")), "num_workers": 0}
    for more in ({}, {"group_by_length": True}, {"max_tokens": 400}):
        module = MMDataModule(**options, max_length="auto", **more)  # type: ignore[arg-type]
        batches = list(module.train_dataloader())
        assert not [each for batch in batches for each in batch.rejected]
        longest = max(int(batch.inputs["attention_mask"].sum(1).max()) for batch in batches)
        assert module.max_length == longest


def test_auto_without_training_rows_is_the_context(family: Family, data: Data) -> None:
    module = MMDataModule(test=str(data["test"]), processor=str(family("llava")), max_length="auto")
    assert module.max_length == module.processing.config.get_text_config().max_position_embeddings


def _one_of_two(rank: int, folder: str, model: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    cache = Path(folder) / f"cache-{rank}"  # as on machines without a common one
    lengths = stored_token_lengths(table_of(Path(folder)), load_processor(model), cache)
    torch.save(lengths.costs, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_also_where_only_one_has_the_file(folder: Path, family: Family, processing: Load) -> None:
    expected = stored_token_lengths(table_of(folder), processing("llava"), folder / "cache-0").costs
    mp.spawn(_one_of_two, args=(str(folder), str(family("llava"))), nprocs=2)
    for rank in (0, 1):
        assert torch.equal(torch.load(folder / f"{rank}.pt", weights_only=True), expected)
        assert len(list((folder / f"cache-{rank}" / "lengths").iterdir())) == 1
