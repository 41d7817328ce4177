"""Streams: every row once over all ranks, a pure function of (seed, epoch), taken up exactly, and what they refuse."""

import json
import os
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from PIL import Image

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data import streaming
from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.readers.source import ReadOptions, open_source, parse_sources
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.sample import Sample
from lightning_mm.data.split import SplitOptions, open_sources
from lightning_mm.data.streaming import SampleStream, StreamSampler, streaming_loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def rows(name: str, count: int) -> list[dict[str, Any]]:
    talk = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This."}]
    return [{"id": f"{name}{number}", "conversations": talk} for number in range(count)]


def jsonl(path: Path, given: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files: a with 7 rows, b with 20."""
    made = tmp_path_factory.mktemp("streams")
    for name, count in (("a", 7), ("b", 20)):
        jsonl(made / f"{name}.jsonl", rows(name, count))
    return made


def stream(
    folder: Path, buffer: int = 5, seed: int = 0, rejected: RejectedSamples | None = None, **weights: float
) -> SampleStream:
    sources = [{"path": str(folder / f"{name}.jsonl"), "weight": weights.get(name, 1.0)} for name in ("a", "b")]
    opened = [open_source(source, ReadOptions()) for source in parse_sources(sources)]
    return SampleStream(opened, seed, buffer, RejectedSamples() if rejected is None else rejected)


def ids(samples: Any) -> list[str]:
    return [sample.id for sample in samples]


EVERY = {f"{name}{number}" for name, count in (("a", 7), ("b", 20)) for number in range(count)}


@settings(deadline=None, max_examples=30)
@given(buffer=st.integers(0, 40), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_without_weights_each_row_is_once_in_an_epoch(folder: Path, buffer: int, seed: int, epoch: int) -> None:
    one, two = stream(folder, buffer, seed), stream(folder, buffer, seed)
    assert ids(one.samples(epoch)) == ids(two.samples(epoch)) == ids(one.samples(epoch))
    assert Counter(ids(one.samples(epoch))) == dict.fromkeys(EVERY, 1)


@settings(deadline=None, max_examples=30)
@given(world=st.integers(1, 5), size=st.integers(1, 4), skip=st.integers(0, 4), epoch=st.integers(0, 2))
def test_ranks_share_the_stream(folder: Path, world: int, size: int, skip: int, epoch: int) -> None:
    shares = []
    for rank in range(world):
        sampler = StreamSampler(stream(folder), size, 0, rank, world)
        sampler.set_epoch(epoch)
        assert sampler.num_batches(None, epoch) == -1
        share = [ids(batch) for batch in sampler]
        assert sampler.num_batches(None, epoch) == len(share)
        sampler.skip = skip
        assert [ids(batch) for batch in sampler] == share[skip:]
        shares.append(share)
    assert len({len(share) for share in shares}) == 1, "all ranks have as many batches"
    counted = Counter(one for share in shares for batch in share for one in batch)
    assert set(counted) == EVERY
    assert 0 <= counted.total() - len(EVERY) < world
    dealt = [one for step in zip(*shares, strict=True) for one in _undealt(list(step))]
    assert dealt[: len(EVERY)] == ids(stream(folder).samples(epoch)), "in the order of one process"


def _undealt(batches: list[list[str]]) -> list[str]:
    """The rows of a step in the order before they were dealt out."""
    return [batch[place] for place in range(len(batches[0])) for batch in batches if place < len(batch)]


def test_epochs_and_seeds_differ(folder: Path) -> None:
    orders = [ids(stream(folder, seed=seed).samples(epoch)) for seed in range(2) for epoch in range(2)]
    assert len(set(map(tuple, orders))) == 4
    alone = ids(stream(folder, 0, b=0).samples(0))
    assert alone == [f"a{number}" for number in range(7)], "without a buffer, rows of a part keep their order"


def test_weights_are_the_shares_and_a_short_source_begins_again(folder: Path) -> None:
    """9 of 10 rows are of a, which begins again; the epoch ends with b. 0.9 +- 4 standard errors of 200 draws."""
    drawn = stream(folder, a=9.0)
    epoch = Counter(ids(drawn.samples(0)))
    of_a = sum(count for name, count in epoch.items() if name.startswith("a"))
    assert abs(of_a / epoch.total() - 0.9) < 4 * (0.09 / 200) ** 0.5
    assert all(epoch[name] == 1 for name in EVERY if name.startswith("b"))
    times = [epoch[f"a{number}"] for number in range(7)]
    assert max(times) - min(times) <= 1, "and its rows equally often"
    assert [each.read for each in drawn.counts] == [7, 20], "a row that is read again does not count again"


def test_rows_of_the_buffer_are_mixed(tmp_path: Path) -> None:
    """A row leaves after 500 rows on average: neither in its place nor anywhere."""
    jsonl(tmp_path / "a.jsonl", rows("a", 3000))
    jsonl(tmp_path / "b.jsonl", rows("b", 1))
    order = [int(name[1:]) for name in ids(stream(tmp_path, 500, b=0).samples(0))]
    shift = [place - number for place, number in enumerate(order)]
    assert 150 < sum(map(abs, shift)) / len(shift) < 1000
    assert min(shift) >= -500, "a row cannot come before it is read"


def module(folder: Path, model: Path, **options: Any) -> MMDataModule:
    sources = [str(folder / f"{name}.jsonl") for name in ("a", "b")]
    return MMDataModule(
        train=sources, streaming=True, **{"shuffle_buffer": 5, "batch_size": 2, "num_workers": 0, **options},
        processor=str(model),
    )  # fmt: skip


def seen(data: MMDataModule, count: int = 99) -> list[list[str]]:
    return [ids(batch.samples) for batch in islice(iter(data.train_dataloader()), count)]


def test_workers_change_nothing(folder: Path, family: Callable[[str], Path]) -> None:
    one, two = (seen(module(folder, family("llava"), num_workers=number)) for number in (0, 2))
    assert one == two
    assert len(one) == 14
    assert {name for batch in one for name in batch} == EVERY


def test_what_is_skipped_is_not_made_into_batches(folder: Path) -> None:
    made: list[list[str]] = []

    def collate(samples: list[Sample]) -> list[str]:
        made.append(ids(samples))
        return made[-1]

    whole = list(streaming_loader(stream(folder), collate, batch_size=2))
    first = streaming_loader(stream(folder), collate, batch_size=2)
    list(islice(iter(first), 9))
    made.clear()
    second = streaming_loader(stream(folder), collate, batch_size=2)
    second.load_state_dict(first.state_dict())
    assert list(second) == whole[9:] == made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"buffer": 6}, "shuffle_buffer was 5, is 6"),
        ({"a": 2.0}, "weights was a 1, b 1, is a 2, b 1"),
        ({"seed": 1}, "seed was 0, is 1"),
    ],
    ids=str,
)
def test_another_order_is_refused(change: dict[str, Any], words: str, folder: Path) -> None:
    first = streaming_loader(stream(folder), ids, batch_size=2)
    next(iter(first))
    seed = change.get("seed", 0)
    with pytest.raises(UserError, match=words):
        streaming_loader(stream(folder, **change), ids, batch_size=2, seed=seed).load_state_dict(first.state_dict())


def test_other_files_are_refused_and_the_same_elsewhere_are_not(folder: Path, tmp_path: Path) -> None:
    first = streaming_loader(stream(folder), ids, batch_size=2)
    next(iter(first))
    state = first.state_dict()
    for name in ("a", "b"):
        copied = tmp_path / f"{name}.jsonl"
        copied.write_bytes((folder / copied.name).read_bytes())
        stat = (folder / copied.name).stat()
        os.utime(copied, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    streaming_loader(stream(tmp_path), ids, batch_size=2).load_state_dict(state)
    jsonl(tmp_path / "a.jsonl", rows("a", 7)[::-1])
    with pytest.raises(UserError, match="files was"):
        streaming_loader(stream(tmp_path), ids, batch_size=2).load_state_dict(state)


def bad(given: list[dict[str, Any]], every: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": "?"} if n >= start and n % every == 0 else row for n, row in enumerate(given)]


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", bad(rows("a", 400), 100, start=1))
    jsonl(tmp_path / "b.jsonl", rows("b", 10))
    rejected = RejectedSamples(0.01)
    drawn = stream(tmp_path, rejected=rejected)
    for epoch in range(2):
        assert len(ids(drawn.samples(epoch))) == 407
        assert rejected.num_rows["train"] == 410
        assert len(rejected.dropped("train")) == 3
    assert drawn.source_counts()[0] | {"path": ""} == {
        **{"split": "train", "name": "a", "path": "", "read": 400, "dropped": 3, "used": 397, "per_epoch": None}
    }


def test_too_many_end_the_run_after_a_thousand_rows_or_at_the_end(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", rows("b", 1))
    jsonl(tmp_path / "a.jsonl", bad(rows("a", 3000), 20))
    samples = stream(tmp_path, 0, b=0).samples(0)
    with pytest.raises(UserError, match=r"50 of 10\d\d rows of data.train cannot be used, the limit is 1.00%"):
        list(islice(samples, 2000))
    jsonl(tmp_path / "a.jsonl", bad(rows("a", 300), 20))
    drawn, samples = stream(tmp_path, 0, b=0), []
    with pytest.raises(UserError, match=r"15 of 300 rows"):
        samples.extend(drawn.samples(0))
    assert len(ids(stream(tmp_path, 0, b=0, rejected=RejectedSamples(0.06)).samples(0))) == 285


def test_a_source_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", bad(rows("a", 5), 1))
    jsonl(tmp_path / "b.jsonl", rows("b", 5))
    with pytest.raises(UserError, match=r"None of the 5 rows of .*a\.jsonl can be used"):
        stream(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 100}, "data.max_tokens does not go with data.streaming"),
        ({"group_by_length": True}, "data.group_by_length does not go with data.streaming"),
        ({"temperature": 2.0}, "data.temperature does not go with data.streaming"),
        ({"shuffle_buffer": -1}, "data.shuffle_buffer is -1"),
    ],
    ids=str,
)
def test_what_needs_all_rows_is_refused(options: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(UserError, match=words):
        module(folder, folder, **options)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"limit": 3}, "limit"),
        ({"first": 3}, "first"),
        ({"repeats": 2.0}, "repeats"),
        ({"weight": -1.0}, "weight is -1"),
    ],
)
def test_options_of_a_source_that_need_all_rows_are_refused(option: dict[str, Any], words: str, folder: Path) -> None:
    sources = parse_sources([{"path": str(folder / "a.jsonl"), **option}])
    with pytest.raises(UserError, match=f"a: {words}"):
        SampleStream([open_source(sources[0], ReadOptions())], 0, 5, RejectedSamples())


class Plain(L.LightningModule):
    """Writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, tuple[str, ...]]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.trained.append((self.current_epoch, tuple(ids(batch.samples))))
        return self.weight * batch.num_supervised

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopAt(Callback):
    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        **{"max_steps": 31, **options},
    )  # fmt: skip


@pytest.mark.parametrize(("stop", "workers"), [(5, 0), (5, 2), (13, 0), (14, 0), (14, 2), (15, 0), (28, 0), (30, 2)])
def test_a_killed_run_goes_on_where_it_stopped(
    stop: int, workers: int, folder: Path, family: Callable[[str], Path], tmp_path: Path
) -> None:
    """14 batches an epoch: in the middle, at the end, after it."""
    whole, first, second = Plain(), Plain(), Plain()
    data = lambda: module(folder, family("llava"), num_workers=workers)  # noqa: E731
    trainer(tmp_path).fit(whole, datamodule=data())
    assert [epoch for epoch, _ in whole.trained] == [0] * 14 + [1] * 14 + [2] * 3
    with pytest.raises(InterruptedError):
        trainer(tmp_path, StopAt(stop, tmp_path / "k.ckpt")).fit(first, datamodule=data())
    trainer(tmp_path).fit(second, datamodule=data(), ckpt_path=tmp_path / "k.ckpt", weights_only=True)
    assert first.trained + second.trained == whole.trained


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_steps": -1, "max_epochs": 2}, "data.streaming needs trainer.max_steps"),
        ({"val_check_interval": 0.5}, "trainer.val_check_interval 0.5 does not go"),
        ({"limit_train_batches": 0.5}, "trainer.limit_train_batches 0.5 does not go"),
        ({"overfit_batches": 2}, "trainer.overfit_batches does not go"),
    ],
    ids=str,
)
def test_a_trainer_that_counts_in_epochs_is_refused(
    options: dict[str, Any], words: str, folder: Path, family: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        trainer(tmp_path, **options).fit(Plain(), datamodule=module(folder, family("llava")))


def test_rows_are_looked_at_without_a_table(folder: Path, family: Callable[[str], Path]) -> None:
    decision_log().clear()
    data = module(folder, family("llava"))
    assert len(data.samples("train")) == 27
    assert data.rows.num_train_rows is None
    assert data.rows_per_batch == 2
    assert len(data.sample_batches(2)) == 2
    assert len(data.example_batch(3)) == 3
    assert data.rows.majority_answers() == {}
    said = "\n".join(map(str, decision_log()))
    assert "data.streaming: the first 27 rows stand for all" in said
    assert "majority: not computed" in said
    assert "a 2" in said, "shares by bytes are said"


def test_few_first_rows_are_kept(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", rows("a", 100))
    jsonl(tmp_path / "b.jsonl", rows("b", 1))
    assert len(stream(tmp_path).first) == streaming._FIRST_ROWS + 1


def test_one_part_is_in_another_order_in_each_epoch(folder: Path) -> None:
    orders = [ids(stream(folder, 5, b=0).samples(epoch)) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 3


def test_a_row_is_the_same_with_and_without_a_table(family: Callable[[str], Path], tmp_path: Path) -> None:
    """Rows of parquet, with their pictures inside."""
    generator = np.random.default_rng(0)
    talk = [{"role": "user", "content": "<image>\nWhich?"}, {"role": "assistant", "content": "This one."}]
    pictures = [Image.fromarray(generator.integers(0, 255, (30, 40 + n, 3), dtype=np.uint8)) for n in range(6)]
    rows = [{"id": f"r{n}", "messages": talk, "images": [picture]} for n, picture in enumerate(pictures)]
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": [datasets.Image()],
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "p.parquet"))
    found: list[dict[str, Batch]] = []
    for streaming_ in (False, True):
        data = MMDataModule(
            train=str(tmp_path / "p.parquet"), streaming=streaming_, batch_size=1, num_workers=0,
            processor=str(family("llava")),
        )  # fmt: skip
        found.append({batch.samples[0].id: batch for batch in data.train_dataloader()})
    table, streamed = found
    assert table.keys() == streamed.keys() == {f"r{n}" for n in range(6)}
    for name, batch in table.items():
        assert batch.inputs.keys() == streamed[name].inputs.keys()
        assert all(torch.equal(tensor, streamed[name].inputs[key]) for key, tensor in batch.inputs.items())
        assert torch.equal(batch.targets, streamed[name].targets)


def test_an_error_in_the_stream_ends_a_run_with_workers(family: Callable[[str], Path], tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", bad(rows("a", 300), 20))
    jsonl(tmp_path / "b.jsonl", rows("b", 1))
    with pytest.raises(UserError, match="15 of 301 rows"):
        seen(module(tmp_path, family("llava"), num_workers=2, batch_size=50))


@pytest.mark.parametrize("column", ["video", "image"])
def test_a_folder_of_frames_is_a_video_and_no_picture(column: str, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    row = {column: "frames", "question": "What?", "answer": "A."}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, column: "none"}))
    options = SplitOptions(cache=tmp_path / "cache")
    sources = open_sources("train", str(tmp_path / "t.jsonl"), options, must_exist=True)
    if column == "image":
        with pytest.raises(UserError, match="'frames' is no regular file"):
            SampleStream(sources, 0, 0, RejectedSamples())
    else:
        (sample,) = SampleStream(sources, 0, 0, RejectedSamples(0.5)).first
        assert sample.videos == (tmp_path / "frames",)
