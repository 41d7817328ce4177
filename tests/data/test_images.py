"""Pictures decode within bounds, to the same RGB everywhere, or say why not."""

import io
import pickle
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from lightning_mm.data.images import BadImage, check_header, load

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(image: Image.Image, name: str = "x.png", **options: object) -> Path:
        image.save(tmp_path / name, **options)  # type: ignore[arg-type]
        return tmp_path / name

    return write


def png_header(path: Path, width: int, height: int) -> Path:
    """A PNG that promises a size, with hardly any bytes behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 0x8040, (0x80, 0x80, 0x80)),
    ],
)
def test_modes(save: Save, mode: str, colour: object, rgb: tuple[int, int, int]) -> None:
    image = load(save(Image.new(mode, (8, 6), colour))).image  # type: ignore[arg-type]
    assert image.mode == "RGB"
    assert image.getcolors() == [(48, rgb)]


def test_half_transparent_lies_on_white(save: Save) -> None:
    (_, colour), *rest = load(save(Image.new("RGBA", (8, 8), (0, 0, 0, 51)))).image.getcolors() or []
    assert not rest
    assert colour == (204, 204, 204)  # 255 * (1 - 51 / 255)


def test_palette_with_a_transparent_colour(save: Save) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    assert load(save(image)).image.getcolors() == [(64, (9, 8, 7))]
    assert load(save(image, transparency=1)).image.getcolors() == [(64, (255, 255, 255))]


def test_cmyk(save: Save) -> None:
    path = save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "x.tif")
    assert load(path).image.getcolors() == [(64, (255, 0, 0))]


def test_exif_rotation(save: Save) -> None:
    image = Image.new("RGB", (32, 16))
    image.paste((255, 255, 255), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = load(save(image, exif=exif)).image
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4)) == (255, 255, 255)
    assert upright.getpixel((8, 28)) == (0, 0, 0)


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp"])
def test_of_an_animation_the_first_frame(save: Save, name: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    path = save(frames[0], name, save_all=True, append_images=frames[1:])
    picture = load(path)
    assert picture.is_animated
    red, _, blue = picture.image.getpixel((8, 8))  # type: ignore[misc]
    assert red > 250  # lossy WebP comes close
    assert blue < 5
    assert not load(save(frames[0], name)).is_animated


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1, 1), "too small"),
        ((3, 50), "too small"),
        ((4, 401), "too narrow"),
        ((1, 10_000), "too small"),
        ((4, 400), None),
    ],
)
def test_odd_sizes(save: Save, size: tuple[int, int], reason: str | None) -> None:
    path = save(Image.new("RGB", size))
    if reason is None:
        assert check_header(path) == load(path).image.size == size
        return
    for look in (check_header, load):
        with pytest.raises(BadImage, match=reason):
            look(path)


@pytest.mark.parametrize("side", [9_000, 12_000, 20_000])
def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, side: int) -> None:
    path = png_header(tmp_path / "bomb.png", side, side)
    for look in (check_header, load):
        with pytest.raises(BadImage, match="image too large"):
            look(path)


def test_the_limit_is_yours(save: Save) -> None:
    path = save(Image.new("RGB", (200, 100)))
    assert check_header(path, max_megapixels=0.02) == (200, 100)
    with pytest.raises(BadImage, match=r"200 x 100 is over 0\.0199 megapixels"):
        check_header(path, max_megapixels=0.0199)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.webp", "x.bmp", "x.tif"])
def test_files_cut_off(save: Save, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as other libraries leave it
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    path = save(noise, name)
    data = path.read_bytes()
    for keep in (0, 4, len(data) // 3, len(data) * 2 // 3):
        path.write_bytes(data[:keep])
        with pytest.raises(BadImage):
            load(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    # Ghostscript would run this one; no decoder that starts a program may be asked.
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    for name, reason in (
        ("a.jpg", "not an image"),
        ("empty.jpg", "the file is empty"),
        ("gone.jpg", "missing image"),
        ("a.eps", "not an image"),
    ):
        with pytest.raises(BadImage, match=reason):
            check_header(tmp_path / name)


def test_floating_point_pixels(save: Save) -> None:
    with pytest.raises(BadImage, match="floating-point"):
        load(save(Image.new("F", (8, 8), 0.5), "x.tif"))


def _encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.linear_gradient("L").resize((24, 24)).convert("RGB")
    image.save(buffer, kind, exif=Image.Exif()) if kind in ("JPEG", "PNG", "WEBP") else image.save(buffer, kind)
    return buffer.getvalue()


ENCODED = {kind: _encoded(kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")}


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(ENCODED)),
    edits=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 4000),
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL remarks on odd metadata that it can do without
def test_damaged_files_never_do_worse_than_bad_image(
    tmp_path_factory: pytest.TempPathFactory, kind: str, edits: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(ENCODED[kind])
    for at, value in edits:
        data[at % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data[: max(len(data) - cut % 200, 0)])
    with suppress(BadImage):
        assert load(path).image.mode == "RGB"


def test_a_bad_image_crosses_processes(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(BadImage(tmp_path / "a.jpg", "not an image: x")))
    assert (error.path, error.reason) == (tmp_path / "a.jpg", "not an image: x")
