"""Rows are measured without opening their pictures, and are what the collator makes of them with pictures."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from lightning_mm.data import token_lengths
from lightning_mm.data.batch import Batch, TokenRegion
from lightning_mm.data.collator import Collator
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.row_meter import RowMeter, measure_rows
from lightning_mm.data.row_table import RowTable
from lightning_mm.data.sample import Rejection
from lightning_mm.data.size_processor import SizeProcessor
from lightning_mm.data.split import SplitOptions, open_split
from lightning_mm.models.encoding import Encoding
from lightning_mm.models.processor import ModelProcessor
from lightning_mm.testing.tiny import FAMILIES

Load = Callable[[str], ModelProcessor]
SIZES = ((60, 40), (40, 80), (200, 50), (33, 34), (224, 224))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> RowTable:
    """Rows with no picture, with one of each size and with two; with one answer and with two; and an emoji."""
    folder = tmp_path_factory.mktemp("rows")
    rows: list[dict[str, Any]] = []
    for index, size in enumerate((*SIZES, None, None)):
        if size:
            Image.radial_gradient("L").resize(size).convert("RGB").save(folder / f"{index}.png")
        names = [] if size is None else [f"{index}.png"] if index else ["0.png", "0.png"]
        turns = [
            {"from": "human", "value": "<image>\n" * len(names) + f"What, ünusual {index}?"},
            {"from": "gpt", "value": f"A thing 🙂 {'indeed ' * index}it is."},
        ]
        turns += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "No."}] if index % 2 else []
        rows.append({"images": names, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return open_split("train", str(folder / "rows.json"), SplitOptions(), RejectedSamples()).samples


def counted(batch: Batch) -> list[tuple[int, ...]]:
    """(text, image, supervised, total) tokens of each row of a batch."""
    regions = batch.regions
    images = (regions == TokenRegion.IMAGE).sum(1)
    totals = (regions != TokenRegion.PAD).sum(1)
    learned = (regions == TokenRegion.ANSWER).sum(1)
    return list(zip((totals - images).tolist(), images.tolist(), learned.tolist(), totals.tolist(), strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_the_batch(name: str, processing: Load, table: RowTable) -> None:
    """The reference is transformers' processor on the decoded pictures, through the collator."""
    made = processing(name)
    measured = measure_rows(table, made, lambda by_size: RowMeter(by_size, None), num_workers=1)
    rejected: list[Rejection] = []
    expected = [Collator(made).collate_valid([sample], rejected) for sample in table]
    assert measured.used.tolist() == [batch is not None for batch in expected]
    assert [replace(each, source="") for each in measured.rejections] == rejected
    assert measured.is_exact
    for row, batch in zip(measured.tokens.tolist(), expected, strict=True):
        if batch is not None:
            assert tuple(row) == counted(batch)[0]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_limit_drops_and_cuts_the_rows_that_it_drops_and_cuts_in_a_run(
    name: str, processing: Load, table: RowTable
) -> None:
    made = processing(name)
    free = measure_rows(table, made, lambda by_size: RowMeter(by_size, None), num_workers=1)
    for limit in sorted(set(free.tokens[:, 3].tolist())):
        limited = measure_rows(table, made, lambda by_size, limit=limit: RowMeter(by_size, limit), num_workers=1)
        rejected: list[Rejection] = []
        collator = Collator(made, limit)
        expected = [collator.collate_valid([sample], rejected) is not None for sample in table]
        assert limited.used.tolist() == expected
        assert [replace(each, source="") for each in limited.rejections] == rejected
        assert limited.tokens.tolist() == free.tokens.tolist(), "lengths are those before the cut"
        over = free.tokens[:, 3] > limit
        assert (limited.cut | limited.too_long).tolist() == over.tolist()
        assert not (limited.cut & limited.too_long).any()


def test_processes_find_what_one_finds(processing: Load, table: RowTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mm.data.row_meter._ROWS_OF_A_JOB", 2)
    made = processing("qwen2_5_vl")
    alone, shared = (measure_rows(table, made, lambda by: RowMeter(by, 60), num_workers=n) for n in (1, 2))
    assert alone.tokens.tolist() == shared.tokens.tolist()
    assert alone.rejections == shared.rejections


def test_very_many_sizes_are_measured_as_fewer(
    processing: Load, table: RowTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = measure_rows(table, processing("qwen2_5_vl"), lambda by: RowMeter(by, None), num_workers=1)
    monkeypatch.setattr(ModelProcessor, "image_token_counts", lambda self, sizes: None)
    monkeypatch.setattr(token_lengths, "MAX_SIZES", 2)
    monkeypatch.setattr(token_lengths, "_CELL", 5.0)  # all sizes are one, the largest width by the largest height
    rough = measure_rows(table, processing("qwen2_5_vl"), lambda by: RowMeter(by, None), num_workers=1)
    assert exact.is_exact
    assert not rough.is_exact
    assert (rough.tokens >= exact.tokens).all()
    assert (rough.tokens[:, 1] > exact.tokens[:, 1]).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_very_many_sizes_are_exact_where_the_processor_says_its_counts(
    name: str, processing: Load, table: RowTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = processing(name)
    exact = measure_rows(table, made, lambda by: RowMeter(by, None), num_workers=1)
    monkeypatch.setattr(token_lengths, "MAX_SIZES", 2)
    grouped = measure_rows(table, made, lambda by: RowMeter(by, None), num_workers=1)
    assert grouped.is_exact == (name != "mllama")
    if grouped.is_exact:
        assert grouped.tokens.tolist() == exact.tokens.tolist()


def test_counts_that_prove_wrong_are_not_used(processing: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_lengths, "MAX_SIZES", 2)
    monkeypatch.setattr(ModelProcessor, "image_token_counts", lambda self, sizes: [7] * len(sizes))
    assert not SizeProcessor(processing("qwen2_5_vl"), {*SIZES, (300, 300)}).is_exact


class WritesTheHour(ModelProcessor):
    """A processor whose text of a picture is not a function of its size: here, of the text around it."""

    def encode(self, texts: Any, images: Any, padding_side: Any) -> Encoding:
        changed = [text.replace("ünusual", "most ünusual") for text in texts]
        return super().encode(changed, images, padding_side)


def test_a_processor_that_does_otherwise_is_found_out(processing: Load, table: RowTable) -> None:
    made = processing("llava")
    other = WritesTheHour(made.processor, made.config)
    by_size = SizeProcessor(other, set(SIZES))
    meter = RowMeter(by_size, None)
    row = meter._row(table[1], [], True)
    assert row is not None
    text, images = row.rendered.text, [row.images]
    before = by_size.encode([text], images, "right").inputs["input_ids"].shape
    meter.prove(table[1], by_size)
    after = by_size.encode([text], images, "right").inputs["input_ids"].shape
    assert before != after == other.encode([text], images, "right").inputs["input_ids"].shape


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shown_text_marks_every_supervised_token(name: str, processing: Load, table: RowTable) -> None:
    """What is learned, tokenized again by the tokenizer alone, are the labels of the batch."""
    made = processing(name)
    meter = RowMeter(made, None)
    for sample in table:
        batch = Collator(made).collate_valid([sample], [])
        shown = meter.show(sample)
        if batch is None:
            assert shown is None
            continue
        assert shown is not None
        learned = [text for kind, text in shown.parts if kind == "learned"]
        decoded = made.processor.tokenizer.decode(batch.targets).replace(" ", "")
        assert "".join(learned).replace(" ", "") == decoded
        answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
        assert [answer in text for answer, text in zip(answers, learned, strict=True)] == [True] * len(answers)
        assert not any(answer in text for kind, text in shown.parts if kind == "context" for answer in answers)
        assert shown.tokens == counted(batch)[0]


def test_what_is_cut_off_is_shown_as_such(processing: Load, table: RowTable) -> None:
    made = processing("qwen2_5_vl")
    whole = RowMeter(made, None).show(table[4])
    assert whole is not None
    cut = RowMeter(made, whole.tokens[3] - 4).show(table[4])
    assert cut is not None
    assert cut.parts[-1][0] == "cut"
    assert "".join(text for _, text in cut.parts) == "".join(text for _, text in whole.parts)
    batch = Collator(made, whole.tokens[3] - 4).collate_valid([table[4]], [])
    assert batch is not None
    learned = "".join(text for kind, text in cut.parts if kind == "learned")
    assert made.processor.tokenizer.decode(batch.targets).strip() == learned.strip()
