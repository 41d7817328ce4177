"""Vision blocks that nothing reads are left out, and only those."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.data.collator import Collator
from lightning_mm.data.readers.conversations import read_conversations
from lightning_mm.execution import vision_truncation
from lightning_mm.execution.vision_truncation import truncate_tower
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.models.processor import load_processing
from tests.helpers.data import make_uneven_rows


@pytest.mark.parametrize(
    ("name", "unread"),
    [
        ("llava", 1),
        ("llava_next", 1),
        ("llava_onevision", 0),
        ("qwen2_5_vl", 0),
        ("qwen3_vl", 0),
        ("gemma3", 0),
        ("mllama", 0),
    ],
)
def test_what_is_not_read_is_not_computed(
    name: str, unread: int, family: Callable[[str], Path], tmp_path: Path
) -> None:
    """LLaVA reads its tower's last block but one (vision_feature_layer -2); equal logits, bit for bit."""
    model: Any = load_model(Backbone(path=str(family(name)))).eval()
    layout = ModelLayout.of(model)
    batch = Collator(load_processing(str(family(name))))(read_conversations(make_uneven_rows(tmp_path)).samples)
    with torch.no_grad():
        expected = model(**batch.inputs).logits
        assert (
            truncate_tower(MultimodalModel(model, layout), batch, ExitStack())
            == tuple(reversed(layout.vision_blocks))[:unread]
        )
        ran: list[str] = []
        for block in layout.vision_blocks:
            part = next(m for m in model.get_submodule(block).modules() if isinstance(m, torch.nn.Linear))
            part.register_forward_hook(lambda *_, name=block: ran.append(name))
        assert torch.equal(model(**batch.inputs).logits, expected)
    assert ran == list(layout.vision_blocks[: len(layout.vision_blocks) - unread])


def test_a_gate_that_is_still_closed_cuts_nothing(family: Callable[[str], Path], tmp_path: Path) -> None:
    """As Llama 3.2's gates begin: the tower changes no logit yet, and will be read as soon as they open."""
    model: Any = load_model(Backbone(path=str(family("mllama")))).eval()
    gates = [p for name, p in model.named_parameters() if "cross_attn" in name and "gate" in name and p.numel() == 1]
    assert gates
    for gate in gates:
        torch.nn.init.zeros_(gate)
    batch = Collator(load_processing(str(family("mllama"))))(read_conversations(make_uneven_rows(tmp_path)).samples)
    assert truncate_tower(MultimodalModel.of(model), batch, ExitStack()) == ()


@pytest.mark.parametrize("undone", [False, True])
def test_blocks_whose_absence_changes_the_logits_are_computed(
    undone: bool, family: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph alone does not decide: here it misses a block that is read. And what is skipped can be put back."""
    mm = MultimodalModel.of(load_model(Backbone(path=str(family("llava")))).eval())
    batch = Collator(load_processing(str(family("llava"))))(read_conversations(make_uneven_rows(tmp_path)).samples)
    with torch.no_grad(), ExitStack() as undo:
        expected = mm.model(**batch.inputs).logits
        if undone:
            assert len(truncate_tower(mm, batch, undo)) == 1
        else:
            blocks = mm.layout.vision_blocks[-2:]
            monkeypatch.setattr(vision_truncation, "unused_vision_blocks", lambda *_: blocks)
            assert truncate_tower(mm, batch, undo) == ()
            assert torch.equal(mm.model(**batch.inputs).logits, expected)
    assert torch.equal(mm.model(**batch.inputs).logits, expected)
    assert all("forward" not in mm.model.get_submodule(name).__dict__ for name in mm.layout.vision_blocks)
