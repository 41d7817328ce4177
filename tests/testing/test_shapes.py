"""Folders of full-size models without weights: the released sizes, and a plan of them by hand."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from lightning_mm.core.errors import UserError
from lightning_mm.testing import build_shape
from lightning_mm.testing.__main__ import main
from lightning_mm.tuning import Full
from lightning_mm.verbs.plan import plan


def test_llava_has_its_sizes_and_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "shape"), "--shape", "llava-1.5-7b"]) == 0
    assert "lightning-mm plan" in capsys.readouterr().out
    config = AutoConfig.from_pretrained(tmp_path / "shape")
    text, vision = config.text_config, config.vision_config
    assert (text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.vocab_size) == (
        32,
        4096,
        11008,
        32064,
    )
    assert (vision.num_hidden_layers, vision.hidden_size, config.vision_feature_layer) == (24, 1024, -2)
    assert not list((tmp_path / "shape").glob("*.safetensors"))
    with pytest.raises(UserError, match="is not empty"):
        build_shape("llava-1.5-7b", tmp_path / "shape")
    with pytest.raises(UserError, match="no shape 'llava'"):
        build_shape("llava", tmp_path / "other")


def test_a_plan_counts_it_as_by_hand(tmp_path: Path) -> None:
    folder = build_shape("llava-1.5-7b", tmp_path / "shape")
    found = plan(
        str(folder), Full(), image_tokens=576, text_tokens=24, supervised=4, batch_size=1, device="h100", compare=False
    )
    assert found.lengths["image_tokens"] == 576
    width, inner, layers, tokens = 4096, 11008, 32, 600
    linear = 2 * tokens * (4 * width * width + 3 * width * inner)
    attention = 2 * 2 * tokens * tokens * width
    blocks = sum(found.own.flops.layers(range(layers)).forward for _ in range(1))
    # Causal attention may be counted as half of all pairs, or as all of them.
    assert layers * (linear + attention / 2) <= blocks * 1.0001
    assert blocks <= layers * (linear + attention) * 1.0001
    assert found.own.census.total == pytest.approx(7.06e9, rel=2e-3)
