"""Bounds on pixels: what each family's processor makes of a large image, and that the options are saved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from PIL import Image

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.models.pixel_bounds import PixelBounds, set_pixel_bounds
from lightning_mm.models.processor import ModelProcessor, load_processor, save_processor

BIG, BOUND = Image.new("RGB", (1600, 1200)), 500_000
# How many channel values of pixels stand for one pixel of the image: copies in time, thumbnails and padding.
FAMILIES = {
    "Qwen2VLImageProcessorPil": "size",
    "Glm4vImageProcessorPil": "size",
    "SmolVLMImageProcessorPil": "longest side",
    "Idefics3ImageProcessorPil": "longest side",
    "GotOcr2ImageProcessorPil": "tiles",
    "Ovis2ImageProcessorPil": "tiles",
    "PixtralImageProcessorPil": "resized before",
    "LlavaOnevisionImageProcessorPil": "resized before",
    "CLIPImageProcessorPil": "no effect",
    "Gemma3ImageProcessorPil": "no effect",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_bounds_by_its_own_option(name: str) -> None:
    made = getattr(transformers, name)()
    decision_log().clear()
    rest = set_pixel_bounds(made, PixelBounds(max_pixels=BOUND))
    (said,) = [d.value for d in decision_log() if d.name == "data.pixels"]
    assert FAMILIES[name] in said
    assert (rest == PixelBounds(max_pixels=BOUND)) == (FAMILIES[name] == "resized before")
    again = type(made).from_dict(made.to_dict())
    options = {"crop_to_patches": True} if FAMILIES[name] == "tiles" else {}
    values = again(images=[rest.resized(BIG)], return_tensors="pt", **options)["pixel_values"]
    if FAMILIES[name] == "size":  # each patch holds two equal frames
        assert BOUND * 0.8 <= values.numel() / 3 / 2 <= BOUND
    elif FAMILIES[name] in ("tiles", "longest side"):  # one tile more is the whole image
        tiles = values.flatten(0, -4)
        assert tiles[1:].numel() / 3 <= BOUND
    if FAMILIES[name] != "no effect":
        assert (
            values.numel()
            < getattr(transformers, name)()(images=[BIG], return_tensors="pt", **options)["pixel_values"].numel()
            or name == "Qwen2VLImageProcessorPil"
        )


def test_images_keep_their_shape() -> None:
    bounds = PixelBounds(100_000, 200_000)
    for size in ((1600, 1200), (100, 90), (400, 400), (3000, 40)):
        width, height = bounds.resized(Image.new("RGB", size)).size
        assert 100_000 <= width * height <= 200_000 or width * height == pytest.approx(200_000, rel=0.05)
        assert width / height == pytest.approx(size[0] / size[1], rel=0.05)
    same = Image.new("RGB", (400, 400))
    assert bounds.resized(same) is same


@pytest.mark.parametrize("bounds", [(0, None), (None, 0), (-1, 5), (10, 5)])
def test_bounds_that_contradict_are_errors(bounds: tuple[int | None, int | None]) -> None:
    with pytest.raises(UserError, match=r"data\.m(in|ax)_pixels"):
        PixelBounds(*bounds)


def test_bounds_are_saved_with_the_processor(processing: Callable[[str], ModelProcessor], tmp_path: Path) -> None:
    made = processing("qwen2_5_vl")
    text = made.render([{"role": "user", "content": [{"type": "image"}]}])
    before = made.encode([text], [[BIG]], "right").inputs["image_grid_thw"]
    made.bound_pixels(PixelBounds())  # none asked for: nothing changes
    assert before.equal(made.encode([text], [[BIG]], "right").inputs["image_grid_thw"])
    made.bound_pixels(PixelBounds(max_pixels=4 * 8 * 8 * 4))
    after = made.encode([text], [[BIG]], "right").inputs["image_grid_thw"]
    assert after.prod() < before.prod()
    save_processor(made.processor, tmp_path)
    made.config.save_pretrained(tmp_path)
    again = load_processor(str(tmp_path))
    assert after.equal(again.encode([text], [[BIG]], "right").inputs["image_grid_thw"])
