"""Images: headers and ends checked before a run, pixels decoded within limits to 8-bit RGB, or a reason why not.

Checked on the header before a pixel is decoded: only formats whose decoders run in this process (EPS would start
Ghostscript); at most ``max_megapixels``; no side under 4 pixels, where rows and color channels of an array cannot be
told apart; no side more than 100 times the other, since resizing to a fixed short side would enlarge it too much. Then
the whole file must decode; EXIF rotation is applied; transparency is put on white; 16-bit grayscale keeps its high
byte; of an animation the first frame is used.

Data flow: image -> ``check_image`` (``picture_check``, before a run) -> size or ``BadImage``; image -> ``load``
(``collator``, in the loader's workers) -> ``DecodedImage``.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from warnings import catch_warnings, simplefilter

from PIL import ExifTags, Image, ImageFile, ImageOps

from lightning_mm.data.image_source import ImageSource

Image.init()
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)
MIN_SIDE = 4
MAX_ASPECT = 100
_ON_ITS_SIDE = range(5, 9)
# What PIL's decoders raise on malformed files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BadImage(ValueError):
    """An image that cannot be used.

    Args:
        path: The image.
        reason: ``category: detail``, as rejections are counted.
    """

    def __init__(self, path: ImageSource, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        text = f"{self.reason} ({self.path.name})"
        return text.encode("utf-8", "backslashreplace").decode()  # names of files need not be UTF-8


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image.

    Args:
        image: Mode RGB, 8 bit, upright.
        is_animated: Whether the file has further frames or pages.
        is_turned: Whether EXIF rotated or mirrored it: coordinates in the stored file differ from those in ``image``.
    """

    image: Image.Image
    is_animated: bool = False
    is_turned: bool = False


def check_header(path: ImageSource, max_megapixels: float = 40.0) -> tuple[int, int]:
    """Width and height in pixels as displayed (after EXIF rotation, where the header holds it), from the header only.

    Args:
        path: The file, or where its content is.
        max_megapixels: Limit on width times height, in megapixels.

    Raises:
        BadImage: Not an image, or outside the limits.
    """
    with opened(path, max_megapixels) as image:
        width, height = image.size
        # Without "exif", getexif() would decode a whole PNG to look behind its pixels.
        is_turned = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) in _ON_ITS_SIDE
        return (height, width) if is_turned else (width, height)


def check_image(path: ImageSource, max_megapixels: float, decode: bool) -> tuple[int, int]:
    """Width and height in pixels as displayed, of an image that is whole; of a larger one than the limit, unchecked.

    A JPEG, PNG, GIF or WebP that has its end is taken as whole; all else is decoded, at a lower resolution where the
    format allows it.

    Args:
        path: The file, or where its content is.
        max_megapixels: No larger image is decoded, in megapixels.
        decode: Whether it is decoded in any case, which finds damage in its middle too.

    Raises:
        BadImage: Not an image, too small or too narrow, or damaged.
    """
    size = check_header(path, float("inf"))
    if size[0] * size[1] <= max_megapixels * 1e6 and (decode or not _has_end(path)):
        with opened(path, max_megapixels) as image, _bad_if_not_decoded(path):
            image.draft(None, (1, 1))
            image.load()
    return size


_TAIL = 12


def _has_end(path: ImageSource) -> bool:
    """Whether an encoded image has the mark that its format ends with."""
    if isinstance(path, Path):
        with path.open("rb") as file:
            head = file.read(_TAIL)
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - _TAIL))
            tail = file.read()
    else:
        content = path.read_bytes()
        head, tail, length = content[:_TAIL], content[-_TAIL:], len(content)
    if head.startswith(b"\xff\xd8"):
        return tail.endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG"):
        return tail[4:8] == b"IEND"
    if head.startswith(b"RIFF"):
        return length >= 8 + int.from_bytes(head[4:8], "little")
    return head.startswith(b"GIF") and tail.endswith(b";")


def load(path: ImageSource, max_megapixels: float = 40.0) -> DecodedImage:
    """The decoded image.

    Args:
        path: The file, or where its content is.
        max_megapixels: Limit on width times height, in megapixels.

    Raises:
        BadImage: Not an image, outside the limits, truncated or damaged.
    """
    with opened(path, max_megapixels) as image, _bad_if_not_decoded(path):
        # The second frame of an MPO is a camera's by-product (gain map, stereo view).
        is_animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
        image.load()
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return DecodedImage(to_rgb(path, ImageOps.exif_transpose(image)), is_animated, is_turned)


@contextmanager
def _bad_if_not_decoded(path: ImageSource) -> Iterator[None]:
    try:
        with _whole_files_only():
            yield
    except BadImage:
        raise
    except DECODE_ERRORS as error:
        raise BadImage(path, f"image does not decode: {error}") from error


@contextmanager
def opened(path: ImageSource, max_megapixels: float) -> Iterator[Image.Image]:
    """An image whose header is within the limits, with no pixel decoded yet. Raises BadImage otherwise.

    Args:
        path: The file, or where its content is.
        max_megapixels: Limit on width times height, in megapixels.
    """
    try:
        with catch_warnings():
            # PIL warns from 89 megapixels on; our own limit is checked next.
            simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path if isinstance(path, Path) else BytesIO(path.read_bytes()), formats=FORMATS)
    except DECODE_ERRORS as error:
        raise BadImage(path, _why_not_opened(path, error)) from error
    with image:
        check_size(path, image.size, max_megapixels)
        yield image


def _why_not_opened(path: ImageSource, error: Exception) -> str:
    if isinstance(path, Path) and not path.is_file():
        return f"missing image: {path.name!r} is {'no regular file' if path.exists() else 'not'} in {path.parent}"
    if isinstance(error, Image.DecompressionBombError):
        return f"image too large: {error}"
    size = path.stat().st_size if isinstance(path, Path) else len(path.read_bytes())
    if size == 0:
        return "not an image: the file is empty"
    return f"not an image: {error}"


def check_size(path: ImageSource, size: tuple[int, int], max_megapixels: float) -> None:
    """Refuse an image by its width and height in pixels.

    Args:
        path: The image.
        size: Width and height.
        max_megapixels: Limit on their product, in megapixels.

    Raises:
        BadImage: It is outside the limits.
    """
    width, height = size
    if width * height > max_megapixels * 1e6:
        raise BadImage(path, f"image too large: {width} x {height} is over {max_megapixels:g} megapixels")
    if min(size) < MIN_SIDE:
        raise BadImage(path, f"image too small: {width} x {height}, sides are at least {MIN_SIDE} px")
    if max(size) > MAX_ASPECT * min(size):
        raise BadImage(path, f"image too narrow: {width} x {height} is beyond {MAX_ASPECT}:1")


@contextmanager
def _whole_files_only() -> Iterator[None]:
    # Other libraries switch this on for the whole process; a truncated image must be an error.
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def to_rgb(path: ImageSource, image: Image.Image) -> Image.Image:
    """An image in mode RGB, 8 bit. Raises BadImage for floating-point pixels.

    Args:
        path: The image, for the message.
        image: Its pixels.
    """
    if image.mode == "F":
        raise BadImage(path, "image has floating-point pixels: there is no one way to show them")
    if image.mode.startswith("I"):
        # 16-bit grayscale, which PIL's own conversion clips to white; wider integers are clipped to 16 bit first.
        gray = image.convert("I").point(lambda value: value * (1 / 256) + 0)
        return gray.convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")
