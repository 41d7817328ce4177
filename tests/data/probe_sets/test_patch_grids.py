"""The tokens of a place: paint a part of a picture, and those tokens are the ones that change; for real processors and
models, not by arithmetic alone."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil

from lightning_mm.data.chat import ChatRenderer
from lightning_mm.data.probe_sets.build.patch_grids import PatchGrids, VisibleRegion
from lightning_mm.data.probe_sets.build.scenes import Box
from lightning_mm.data.probe_sets.collator import ProbeCollator
from lightning_mm.data.probe_sets.probe_set import ObjectBox, ProbeRow
from lightning_mm.data.sample import Sample, Turn
from lightning_mm.models.processor import Processing, load_processing
from lightning_mm.testing.tiny import build_tiny
from tests.helpers.data import Family

PLAIN = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "internvl")
TILED = ("llava_next", "llava_onevision", "mllama")
SIZES = ((64, 64), (60, 40), (40, 90), (300, 200))
NANO = Path("nano/model")


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower with a class token in front, which the features keep."""
    return build_tiny("llava", tmp_path_factory.mktemp("tiny") / "dinov2", tower="dinov2")


def noise(size: tuple[int, int]) -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy(), "RGB")


def painted(picture: Image.Image, box: Box) -> Image.Image:
    copy = picture.copy()
    ImageDraw.Draw(copy).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(255, 0, 0))
    return copy


def row_about(path: Path, *boxes: Box) -> ProbeRow:
    sample = Sample(path.name, (Turn("user", "<image>\nWhat?"),), (path,), path.name)
    return ProbeRow(path.name, "g", "picture", sample, "What?", {}, tuple(ObjectBox("x", box) for box in boxes))


def cells(size: tuple[int, int]) -> Iterator[Box]:
    """Places all over a picture, from a sixth to three tenths of its sides."""
    for x, y, w, h in ((0, 0, 0.3, 0.3), (0.7, 0.1, 0.3, 0.2), (0.4, 0.45, 0.17, 0.25), (0.05, 0.75, 0.25, 0.25)):
        yield (round(x * size[0]), round(y * size[1]), round((x + w) * size[0]), round((y + h) * size[1]))


def entering(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B, L, D) what enters the decoder: embeddings with the pictures' features put in."""
    taken = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken.append(kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else args[0])

    handle = model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    return taken[0]


def assert_painting_changes_its_own_tokens(folder: Path, size: tuple[int, int], tmp_path: Path) -> None:
    """Of the tokens that a place covers wholly, as many are among those that change most."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    collator = ProbeCollator(load_processing(str(folder)))
    base = noise(size)
    base.save(tmp_path / "base.png")
    for number, box in enumerate(cells(size)):
        painted(base, box).save(tmp_path / f"{number}.png")
        batch = collator([row_about(tmp_path / "base.png", box), row_about(tmp_path / f"{number}.png", box)])
        x_BLD = entering(model, batch.inputs)
        if batch.rejected:
            assert {each.reason for each in batch.rejected} == {"no object site: 'x' is cropped away"}
            assert torch.equal(x_BLD[0], x_BLD[1])
            continue
        changed_L = (x_BLD[0] - x_BLD[1]).norm(dim=-1)
        weights_L, is_image_L = batch.weights[0, 4], batch.weights[0, 1] > 0
        assert (weights_L[~is_image_L] == 0).all()
        num_whole = int((weights_L > 0.99 * weights_L.max()).sum())
        most = changed_L.masked_fill(~is_image_L, -1).topk(num_whole).indices
        assert (weights_L[most] > 0).all(), (size, box)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PLAIN)
def test_what_is_painted_is_what_changes(name: str, size: tuple[int, int], family: Family, tmp_path: Path) -> None:
    assert_painting_changes_its_own_tokens(family(name), size, tmp_path)


@pytest.mark.parametrize("size", SIZES)
def test_with_a_class_token_in_front(size: tuple[int, int], dinov2: Path, tmp_path: Path) -> None:
    assert_painting_changes_its_own_tokens(dinov2, size, tmp_path)


@pytest.mark.skipif(not NANO.is_dir(), reason="the nano model is not built")
def test_on_the_nano_model(tmp_path: Path) -> None:
    assert_painting_changes_its_own_tokens(NANO, (112, 112), tmp_path)


@pytest.mark.parametrize("name", TILED)
def test_tiles_are_said_not_guessed(name: str, processing: Callable[[str], Processing], tmp_path: Path) -> None:
    noise((60, 40)).save(tmp_path / "a.png")
    batch = ProbeCollator(processing(name))([row_about(tmp_path / "a.png", (0, 0, 9, 9), (9, 9, 20, 20))])
    assert not any(site.startswith("object") for site in batch.sites[0])
    (rejection,) = batch.rejected
    assert (rejection.kind, rejection.reason) == ("cut", "no object sites: the picture is cut into tiles")


def grids(made: Processing, **config: Any) -> PatchGrids:
    chat = ChatRenderer(made)
    text = chat.render([Turn("user", "<image>\n?")], add_generation_prompt=True).text
    merge_size = getattr(made.processor.image_processor, "merge_size", 1)
    return PatchGrids(
        lambda image: made.encode([text], [[image]], "right").inputs, made.config.to_dict() | config, merge_size
    )


def seen(made: Processing, size: tuple[int, int]) -> VisibleRegion:
    window = grids(made)._measure_region(size)
    assert isinstance(window, VisibleRegion)
    return window


@pytest.mark.parametrize("size", [(64, 64), (90, 60), (50, 200), (33, 47)])
def test_windows_are_those_of_resize_and_centre_crop(
    size: tuple[int, int], processing: Callable[[str], Processing]
) -> None:
    """CLIP's arithmetic, in whole pixels: the short side is resized to so many, and of the long one as many are kept.
    The ramp has 256 steps and resizing bends it at its ends: one percent of the side is allowed."""
    made = processing("llava")
    side = made.processor.image_processor.crop_size["height"]
    resized = [int(side * length / min(size)) for length in size]
    starts = [(there - side) // 2 for there in resized]
    expected = [start * length / there for start, length, there in zip(starts, size, resized, strict=True)]
    expected += [(start + side) * length / there for start, length, there in zip(starts, size, resized, strict=True)]
    window = seen(made, size)
    assert (window.height, window.width) == (side, side)
    for got, want, length in zip(
        (window.left, window.top, window.right, window.bottom), expected, size * 2, strict=True
    ):
        assert abs(got - want) <= 0.01 * length


@pytest.mark.parametrize("fill", [0, 0.5, 1.0])
def test_windows_see_padding(fill: float, processing: Callable[[str], Processing]) -> None:
    """A picture put into the upper left of a square twice its height, whatever it is filled up with."""
    made = processing("llava")

    def encode(image: Image.Image) -> dict[str, Tensor]:
        small = CLIPImageProcessorPil(size={"height": 16, "width": 32}, do_center_crop=False)
        pixels = small(images=image, return_tensors="pt")["pixel_values"]
        return {"pixel_values": torch.cat([pixels, torch.full((1, 3, 16, 32), fill)], 2)}

    window = PatchGrids(encode, made.config.to_dict())._measure_region((60, 30))
    assert isinstance(window, VisibleRegion)
    assert (window.left, window.right) == pytest.approx((0, 60), abs=0.6)
    assert (window.top, window.bottom) == pytest.approx((0, 60), abs=1.2), "it goes on beyond the picture"


def test_what_is_cropped_away_has_no_tokens(processing: Callable[[str], Processing], tmp_path: Path) -> None:
    noise((90, 30)).save(tmp_path / "a.png")
    made = processing("llava")
    batch = ProbeCollator(made)([row_about(tmp_path / "a.png", (0, 0, 20, 30), (31, 1, 59, 29))])
    assert batch.sites[0] == ("last", "image", "text", "token", "object:1")
    assert [each.reason for each in batch.rejected] == ["no object site: 'x' is cropped away"]
    weights = batch.weights[0, 4][batch.weights[0, 1] > 0]
    assert weights.min() > 0, "the second box is nearly the whole of what is left"
    assert weights.sum() == pytest.approx(1, abs=1e-6)


def test_weights_are_overlaps(processing: Callable[[str], Processing]) -> None:
    """By hand: 64 x 64 seen whole as 4 x 4 tokens of 16 x 16; the box covers half of one token and all of its right."""
    made = processing("llava")
    shown = grids(made).weights((8, 16, 32, 32), (64, 64), 16, None)
    assert isinstance(shown, Tensor)
    expected = torch.zeros(4, 4)
    expected[1, 0], expected[1, 1] = 8 * 16, 16 * 16
    # The window is found to about a percent of a pixel's 64; an edge that is off by 0.3 px moves 5 of 256.
    torch.testing.assert_close(shown.reshape(4, 4), expected, rtol=0, atol=12)


@pytest.mark.parametrize(
    ("config", "num_tokens", "reason"),
    [
        ({}, 15, "form no grid"),
        ({}, 1, "form no grid"),
        ({"vision_config": {}}, 16, "form no grid"),
        ({"perceiver_config": {}}, 16, "learned queries"),
        ({"num_query_tokens": 16}, 16, "learned queries"),
    ],
)
def test_no_grid_is_made_up(
    config: dict[str, Any], num_tokens: int, reason: str, processing: Callable[[str], Processing]
) -> None:
    told = grids(processing("llava"), **config).weights((0, 0, 9, 9), (64, 64), num_tokens, None)
    assert isinstance(told, str)
    assert reason in told


def test_a_told_grid_that_does_not_fit_is_not_used(processing: Callable[[str], Processing]) -> None:
    made = grids(processing("qwen2_5_vl"))
    for thw in ((2, 4, 4), (1, 4, 8)):
        told = made.weights((0, 0, 9, 9), (64, 64), 4, torch.tensor(thw))
        assert told == "no object sites: the picture's tokens form no grid"
    assert isinstance(made.weights((0, 0, 9, 9), (64, 64), 4, torch.tensor((1, 4, 4))), Tensor)


def test_a_processor_that_bends_pictures_is_noticed(processing: Callable[[str], Processing]) -> None:
    made = processing("llava")

    def mirrored(image: Image.Image) -> dict[str, Tensor]:
        pixels = CLIPImageProcessorPil(size={"height": 32, "width": 32})(images=image, return_tensors="pt")
        return {
            "pixel_values": torch.cat([pixels["pixel_values"][..., :16], pixels["pixel_values"][..., :16].flip(-1)], -1)
        }

    told = PatchGrids(mirrored, made.config.to_dict()).weights((0, 0, 9, 9), (64, 64), 16, None)
    assert told == "no object sites: the processor does more to a picture than resize, crop and pad it"
