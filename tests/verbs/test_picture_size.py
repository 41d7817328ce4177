"""A picture of so many image tokens: the nearest there is, and none larger than the processor keeps one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.loading import Backbone
from lightning_mm.models.pixel_bounds import PixelBounds
from lightning_mm.models.processor import ModelProcessor, load_processor
from lightning_mm.testing import build_shape, build_tiny
from lightning_mm.verbs import picture_size
from lightning_mm.verbs.picture_size import PictureSizes
from lightning_mm.verbs.plan_batches import RowLengths, micro_batches

Made = list[tuple[int, int]]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Sizes of the blank pictures that go through a processor."""
    sizes: Made = []

    def recorded(size: tuple[int, int]) -> Image.Image:
        sizes.append(size)
        return Image.new("RGB", size)

    monkeypatch.setattr(picture_size, "gray_image", recorded)
    return sizes


def tokens_of(processing: ModelProcessor, size: tuple[int, int]) -> int:
    """Image tokens by the processor's own arithmetic."""
    counts = processing.image_token_counts([size])
    assert counts is not None
    return counts[0]


@pytest.mark.parametrize("wanted", [4, 6, 9, 12, 16])
def test_the_number_is_met_where_a_picture_has_it(wanted: int, processing: Callable[[str], ModelProcessor]) -> None:
    """Qwen-VL's pictures have any number of rows and columns of 14 x 14 pixels, 1 to 16 tokens."""
    own = processing("qwen2_5_vl")
    assert tokens_of(own, PictureSizes(own).nearest(wanted)) == wanted


def test_no_picture_is_larger_than_the_processor_keeps(processing: Callable[[str], ModelProcessor], made: Made) -> None:
    own = processing("qwen2_5_vl")
    found = PictureSizes(own).nearest(1000)
    assert tokens_of(own, found) == 16
    assert max(width * height for width, height in made) <= 16 * 14 * 14
    made.clear()
    own.bound_pixels(PixelBounds(max_pixels=6 * 14 * 14))
    assert tokens_of(own, PictureSizes(own).nearest(1000)) <= 6
    assert max(width * height for width, height in made) <= 6 * 14 * 14


@pytest.mark.parametrize("name", ["llava", "gemma3", "mllama", "idefics3"])
def test_one_size_for_all_takes_two_pictures(
    name: str, processing: Callable[[str], ModelProcessor], made: Made
) -> None:
    """These make as many tokens of every picture: 48,384 x 48,384 pixels were tried for one of them."""
    own = processing(name)
    sizes = PictureSizes(own)
    assert sizes.nearest(576) == (336, 336)
    assert made == [(336, 336), (672, 672)]


def test_tiles_are_counted_with_their_whole(tmp_path: Path, made: Made) -> None:
    """InternVL: n tiles of 28 x 28 pixels and the whole, 4 tokens each and one more at either end."""
    own = load_processor(str(build_tiny("internvl", tmp_path / "model", split_images=True)))
    sizes = PictureSizes(own)
    assert sizes.num_tokens(sizes.largest()) == 4 * (4 + 1)
    assert tokens_of(own, sizes.largest()) == 4 * (4 + 1) + 2
    assert sizes.num_tokens(sizes.nearest(12)) == 4 * (2 + 1)
    assert max(width * height for width, height in made) <= 4 * 28 * 28


def test_rows_of_a_plan_have_the_bounds_of_the_run(tmp_path: Path) -> None:
    """1280 tokens of Qwen2.5-VL are about a million pixels, which data.max_pixels halves."""
    backbone = Backbone(path=str(build_shape("qwen2.5-vl-3b", tmp_path / "shape")))
    lengths = RowLengths(image_tokens=1280, text_tokens=90, supervised=8)
    (batch,) = micro_batches(backbone, MMDataModule(batch_size=1, max_pixels=501_760), lengths, None)
    tokens = int(batch.inputs["image_grid_thw"][0].prod()) // 4
    assert 640 * 0.95 <= tokens <= 640
    assert len(batch.real) - tokens == 90
