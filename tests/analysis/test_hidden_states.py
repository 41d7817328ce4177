"""Readings: blocks that are left out, shapes that cannot be read, rows that fell out, rows of one reading only."""

from pathlib import Path

import pytest
import torch

from lightning_mm.analysis.hidden_states import HiddenStates, common_samples, extract_hidden_states, pool
from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.sample import Rejection
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.loading import Backbone, load_model
from tests.helpers.data import Family

CPU = torch.device("cpu")


@torch.no_grad()
def test_a_block_that_is_skipped_is_the_identity(family: Family, probes: Path) -> None:
    """Mllama leaves its cross-attention (block 1) out of batches without pictures; the states are transformers' own."""
    decision_log().clear()
    model = load_model(Backbone(path=str(family("mllama")))).eval()
    layout = ModelLayout.of(model)
    data = MMDataModule(probes=str(probes), processor=str(family("mllama")), batch_size=8, num_workers=0)
    rows = [row for row in data.probe_set().rows if row.role == "text"]
    batches = [batch for batch in data.probe_loader(data.probe_set()) if {row.role for row in batch.rows} == {"text"}]
    assert batches
    reading = extract_hidden_states(MultimodalModel(model, layout), batches, CPU)
    features = reading.features["text/last"]
    assert 0 < features.shape[1] <= len(rows)
    assert torch.equal(features[2], features[1])
    assert not torch.equal(features[3], features[2])
    last = model(**batches[0].inputs, use_cache=False, output_hidden_states=True).hidden_states[-1]
    decoder: torch.nn.Module = model.get_decoder()  # type: ignore[operator]
    ends = batches[0].inputs["attention_mask"].sum(1) - 1
    normed = decoder.norm(features[4, : len(ends)])  # type: ignore[operator]
    torch.testing.assert_close(normed, last[torch.arange(len(ends)), ends], atol=1e-6, rtol=1e-5)
    assert [d.name for d in decision_log()].count("inspection.blocks") == 1
    for first in (2, 3):  # the slice below the lowest that is read anew is what a skipped block passes on
        again = extract_hidden_states(MultimodalModel(model, layout), batches, CPU, before=reading, unchanged=first)
        assert torch.equal(again.features["text/last"], features)


@torch.no_grad()
def test_all_slices_from_before_need_no_forward(family: Family, probes: Path) -> None:
    model = load_model(Backbone(path=str(family("llava")))).eval()
    before = HiddenStates(0, {"text/last": torch.ones(5, 1, 2)}, {"text/last": (("a", 0),)})
    again = extract_hidden_states(
        MultimodalModel(model, ModelLayout.of(model)), iter(()), CPU, step=7, before=before, unchanged=5
    )
    assert again.step == 7
    assert again.features is before.features


@pytest.mark.parametrize("shape", [(4, 2, 5, 8), (2, 6, 8), (10, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    """Gemma 3n carries several streams per token: pooled over the wrong axis they would pass for a reading."""
    with pytest.raises(UserError, match="one vector per token"):
        pool(torch.zeros(shape), torch.ones(2, 1, 5))


def test_nothing_that_was_read_has_no_slices() -> None:
    rejected = (Rejection("a:1", "too long: 900 tokens"), Rejection("a:2", "too long: 800 tokens"))
    empty = HiddenStates(0, {}, {}, rejected)
    assert empty.problems == ("probe rows with 'too long': 2, such as a:1 (too long: 900 tokens)",)
    with pytest.raises(UserError, match="too long"):
        _ = empty.num_slices


def test_what_one_reading_lacks_neither_keeps() -> None:
    def reading(*rows: str) -> HiddenStates:
        features = torch.tensor([[[float(ord(row))] for row in rows]])
        return HiddenStates(0, {"text/last": features}, {"text/last": tuple((row, 0) for row in rows)})

    one, other, left_out = common_samples(reading("a", "b", "d"), reading("b", "c", "d"))
    assert left_out == 2
    assert one.sample_index == other.sample_index == {"text/last": (("b", 0), ("d", 0))}
    assert torch.equal(one.features["text/last"], other.features["text/last"])
    whole = reading("a")
    assert common_samples(whole, reading("a"))[0] is whole
