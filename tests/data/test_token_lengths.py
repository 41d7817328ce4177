"""Lengths are known before a picture is decoded, and they are those of the batches that come later."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from lightning_mm.data import token_lengths
from lightning_mm.data.batch import TokenRegion
from lightning_mm.data.collator import Collator
from lightning_mm.data.images import check_header
from lightning_mm.data.sample import Sample, Turn
from lightning_mm.data.token_lengths import TokenLengths, measure_token_lengths, num_patches, vision_weight
from lightning_mm.models.processor import ModelProcessor, load_processor
from lightning_mm.testing.tiny import FAMILIES

Load = Callable[[str], ModelProcessor]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for width, height in ((60, 40), (40, 80), (200, 50), (33, 34)):
        paths.append(folder / f"{width}x{height}.png")
        Image.radial_gradient("L").resize((width, height)).convert("RGB").save(paths[-1])
    turned = Image.Exif()
    turned[0x0112] = 6
    paths.append(folder / "turned.jpg")
    Image.new("RGB", (90, 30)).save(paths[-1], exif=turned)
    return paths


def talk(index: int, images: tuple[Path, ...] = (), turns: int = 1) -> Sample:
    words = random.Random(index).choices(["red", "thing", "what", "is", "ünusual"], k=index % 7)
    said = []
    for number in range(turns):
        mark = "<image>\n" * len(images) if number == 0 else ""
        said += [Turn("user", f"{mark}Question {number} {' '.join(words)}?"), Turn("assistant", f"{number} " * index)]
    return Sample(str(index), tuple(said), images, f"t.json:{index}")


def row_lengths(processing: ModelProcessor, samples: list[Sample], max_length: int | None = None) -> list[int]:
    batch = Collator(processing, max_length)(samples)
    assert batch.samples == tuple(samples)
    return (batch.regions != TokenRegion.PAD).sum(1).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_lengths_are_those_of_the_batch(name: str, processing: Load, pictures: list[Path]) -> None:
    samples = [talk(i + 1, (picture,), turns=1 + i % 3) for i, picture in enumerate(pictures)]
    samples += [talk(9), talk(4, turns=3), talk(3, (pictures[0], pictures[0]))]
    made = processing(name)
    measured = measure_token_lengths(samples, made)
    assert measured.tokens.tolist() == row_lengths(made, samples)
    longest = int(measured.tokens.max()) - 1
    assert measure_token_lengths(samples, made, max_length=longest).tokens.max() == longest
    assert (measured.vision > 0).tolist() == [bool(sample.images) for sample in samples]
    assert torch.equal(measured.costs, measured.tokens + measured.vision)


def test_a_header_tells_the_size_as_it_is_decoded(pictures: list[Path]) -> None:
    assert check_header(pictures[-1]) == (30, 90)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_patches_are_counted(name: str, processing: Load) -> None:
    made = processing(name)
    chat = token_lengths.ChatRenderer(made).render_unmarked([Turn("user", "<image>\nWell?")])
    inputs = made.encode([chat], [[Image.new("RGB", (60, 40))]], "right").inputs
    if name == "llava":
        side = made.config.vision_config.image_size // made.config.vision_config.patch_size
        assert num_patches(inputs, made.config) == side**2
    else:
        assert num_patches(inputs, made.config) == len(inputs["pixel_values"])
    assert num_patches({}, made.config) == 0
    assert 0 < vision_weight(made.config) < 10


def test_what_cannot_be_used_is_measured_all_the_same(processing: Load, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"nothing")
    special = Sample("s", (Turn("user", "<image> </s>"), Turn("assistant", "Yes")), (pictures[0],))
    alone = Sample("a", (Turn("assistant", "Yes"),))
    broken = talk(3, (tmp_path / "no.png",))
    measured = measure_token_lengths([special, alone, broken, talk(3)], processing("llava"))
    assert (measured.tokens > 0).all()
    assert measured.vision.tolist()[1:] == [0, 0, 0]


def test_very_many_sizes_are_measured_as_few(processing: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = processing("qwen2_5_vl")
    paths = {tmp_path / f"{i}.png": (200 + i % 40, 300 + i // 40) for i in range(400)}
    samples = [talk(2, (path,)) for path in paths]
    calls = []
    encode = made.encode
    monkeypatch.setattr(made, "encode", lambda *args: calls.append(1) or encode(*args))
    rough = measure_token_lengths(samples, made, sizes=paths).tokens
    assert len(calls) < 30
    monkeypatch.setattr(token_lengths, "MAX_SIZES", 1000)
    exact = measure_token_lengths(samples, made, sizes=paths).tokens
    assert len(calls) > 400
    assert (rough >= exact).all()
    assert ((rough - exact) / exact).max() < 0.15


def test_another_set_of_lengths_has_another_digest() -> None:
    tokens, vision = torch.tensor([3, 4]), torch.tensor([1.0, 0.0], dtype=torch.float64)
    first = TokenLengths(tokens, vision)
    assert first.digest == TokenLengths(tokens.clone(), vision.clone()).digest
    assert len({first.digest, TokenLengths(tokens + 1, vision).digest, TokenLengths(tokens, vision + 1).digest}) == 3


def _one_of_two(rank: int, folder: str, model: str, samples: list[Sample]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(measure_token_lengths(samples, load_processor(model)).costs, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_the_work_and_agree(
    family: Callable[[str], Path], processing: Load, pictures: list[Path], tmp_path: Path
) -> None:
    samples = [talk(i, (pictures[i % 3],) if i % 2 else ()) for i in range(1, 8)]
    mp.spawn(_one_of_two, args=(str(tmp_path), str(family("llava")), samples), nprocs=2)
    alone = measure_token_lengths(samples, processing("llava")).costs
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt", weights_only=True), alone)
