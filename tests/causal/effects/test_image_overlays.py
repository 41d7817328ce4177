"""Where image tokens lie in the picture, and maps laid over it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_mm.causal.effects.attention_flow import contributions
from lightning_mm.causal.effects.image_overlays import PictureGrids, contribution_map
from lightning_mm.causal.interventions.activation_cache import cache_activations
from lightning_mm.causal.questions.image_regions import BoxTokens
from lightning_mm.causal.questions.question import EncodedQuestion, Question
from lightning_mm.core.errors import UserError
from lightning_mm.data.probe_sets.build.patch_grids import NO_GRID, NO_OBJECT_SITES, PatchGrids
from lightning_mm.data.probe_sets.files import ObjectBox
from tests.helpers.causal_models import SPAN, TEXT, subject


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "gemma3"])
def test_every_image_token_has_its_place(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()
    grid = PictureGrids(one.processing).grid(encoded)
    assert grid.before + grid.rows * grid.columns == len(encoded.image)
    assert grid.window is not None
    run = cache_activations(one.mm, encoded.inputs)
    shown = contribution_map(one.mm, run, encoded, grid, 1)
    sizes = contributions(one.mm, run, 1, encoded.constraint).norm(dim=-1).mean(0)[encoded.image]
    torch.testing.assert_close(torch.tensor(shown["weights"]).flatten(), sizes[grid.before :])
    assert shown["grid"] == [grid.rows, grid.columns]
    assert (shown["id"], shown["what"]) == ("q0", "contribution to the constraint, layer 1")
    # The token in the picture's middle shows the picture's middle.
    row, column = grid.rows // 2, grid.columns // 2
    left, top, right, bottom = grid.window
    across, down = (right - left) / grid.columns, (bottom - top) / grid.rows
    middle = (left + across * (column + 0.4), top + down * (row + 0.4))
    box = (*middle, middle[0] + across * 0.2, middle[1] + down * 0.2)
    expected = encoded.image[grid.before + row * grid.columns + column]
    shown_at = BoxTokens(one.processing)(one.encode(boxes=(ObjectBox("middle", box),)))
    assert isinstance(shown_at, torch.Tensor), shown_at
    assert shown_at.tolist() == [int(expected)]


def test_what_has_no_place_is_refused_with_the_reason(
    family: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject(family, "llava", tmp_path)
    encoded, grids = one.encode(), PictureGrids(one.processing)
    files = []
    for number in range(2):
        files.append(tmp_path / f"two-{number}.png")
        Image.new("RGB", (40, 40)).save(files[-1])
    two = one.encoder.encode(Question("two", TEXT, tuple(files), (SPAN,)))
    assert isinstance(two, EncodedQuestion)
    with pytest.raises(UserError, match="2 pictures"):
        grids.grid(two)
    monkeypatch.setattr(PatchGrids, "layout", lambda *_: NO_GRID)
    assert (grids.grid(encoded).rows, grids.grid(encoded).window) == (4, None), "16 tokens of an unknown kind"
    queries = f"{NO_OBJECT_SITES}: the picture's tokens are learned queries, not places"
    monkeypatch.setattr(PatchGrids, "layout", lambda *_: queries)
    with pytest.raises(UserError, match="learned queries"):
        grids.grid(encoded)
    odd = EncodedQuestion(
        encoded.question, encoded.inputs, encoded.tokens, encoded.image[:15], encoded.spans, encoded.text
    )
    monkeypatch.setattr(PatchGrids, "layout", lambda *_: NO_GRID)
    with pytest.raises(UserError, match="no grid"):
        grids.grid(odd)


def test_cross_attention_has_no_map(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "mllama", tmp_path)
    encoded = one.encode()
    with pytest.raises(UserError, match="over the picture"):
        PictureGrids(one.processing).grid(encoded)
