"""A picture file, decoded within bounds into 8-bit RGB, or the reason why it cannot be.

Data flow: ``datamodule`` checks headers at set-up; ``collator`` decodes in the loader's workers.

The rules, all checked on the header before a pixel is decoded:
    only formats whose decoders run in this process (EPS would start Ghostscript);
    at most ``max_megapixels``; no side under 4 px, where an array's rows cannot be told from its colour channels;
    no side more than 100 times the other, which resizing to a fixed short side would blow up.
Then: the whole file must decode; EXIF rotation is applied; transparency lies on white; 16-bit greys keep their high
byte; of an animation the first frame is taken, and said so.

A cheap look at every picture before a run begins: only its header is read, and only once.

Data flow: ``datamodule`` hands in Samples; those whose pictures are sound come back, the others are in the ledger.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from warnings import catch_warnings, simplefilter

from PIL import ExifTags, Image, ImageFile, ImageOps

from lightning_mm.core.decisions import decide
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.sample import Rejection, Sample

Image.init()
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)
MIN_SIDE = 4
MAX_ASPECT = 100
_ON_ITS_SIDE = range(5, 9)
# What PIL's decoders raise on bytes that are not what they promise to be.
_DECODE_ERRORS = (
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
    """A picture that cannot be used.

    Args:
        path: The file.
        reason: ``category: detail``, as the ledger counts them.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.reason} ({self.path.name})"


@dataclass(frozen=True)
class DecodedImage:
    """A decoded picture.

    Args:
        image: Mode RGB, 8 bit, upright.
        is_animated: Whether there are more frames, or pages, than this first one.
        is_turned: Whether EXIF asked for it to be turned or mirrored: places in the file as stored are others here.
    """

    image: Image.Image
    is_animated: bool = False
    is_turned: bool = False


def check_header(path: Path, max_megapixels: float = 40.0) -> tuple[int, int]:
    """Read only the header: a cheap look at every file before a run begins.

    Returns:
        Width and height in pixels as the picture is decoded: after its EXIF rotation, where the header holds one.

    Raises:
        BadImage: Not a picture, or outside the bounds.
    """
    with _open(path, max_megapixels) as image:
        width, height = image.size
        # Without "exif", getexif() would decode a whole PNG to look behind its pixels.
        is_turned = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) in _ON_ITS_SIDE
        return (height, width) if is_turned else (width, height)


def load(path: Path, max_megapixels: float = 40.0) -> DecodedImage:
    """Decode a whole picture.

    Raises:
        BadImage: Not a picture, outside the bounds, cut off or damaged.
    """
    with _open(path, max_megapixels) as image:
        try:
            with _whole_files_only():
                # The second frame of an MPO is a camera's by-product (a gain map, the other eye).
                is_animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
                image.load()
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            return DecodedImage(_to_rgb(path, ImageOps.exif_transpose(image)), is_animated, is_turned)
        except BadImage:
            raise
        except _DECODE_ERRORS as error:
            raise BadImage(path, f"image does not decode: {error}") from error


@contextmanager
def _open(path: Path, max_megapixels: float) -> Iterator[Image.Image]:
    try:
        with catch_warnings():
            # PIL warns from 89 megapixels on; our own limit, checked next, is an error.
            simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
    except _DECODE_ERRORS as error:
        raise BadImage(path, _why_not_opened(path, error)) from error
    with image:
        _check_size(path, image.size, max_megapixels)
        yield image


def _why_not_opened(path: Path, error: Exception) -> str:
    if not path.is_file():
        return f"missing image: {path.name}"
    if isinstance(error, Image.DecompressionBombError):
        return f"image too large: {error}"
    if path.stat().st_size == 0:
        return "not an image: the file is empty"
    return f"not an image: {error}"


def _check_size(path: Path, size: tuple[int, int], max_megapixels: float) -> None:
    width, height = size
    if width * height > max_megapixels * 1e6:
        raise BadImage(path, f"image too large: {width} x {height} is over {max_megapixels:g} megapixels")
    if min(size) < MIN_SIDE:
        raise BadImage(path, f"image too small: {width} x {height}, sides are at least {MIN_SIDE} px")
    if max(size) > MAX_ASPECT * min(size):
        raise BadImage(path, f"image too narrow: {width} x {height} is beyond {MAX_ASPECT}:1")


@contextmanager
def _whole_files_only() -> Iterator[None]:
    # Other libraries switch this on for the whole process; half a picture is not the picture.
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _to_rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage(path, "image has floating-point pixels: there is no one way to show them")
    if image.mode.startswith("I"):
        # 16-bit grey, which PIL's own conversion clips to white; wider integers are clipped to 16 bit first.
        grey = image.convert("I").point(lambda value: value * (1 / 256) + 0)
        return grey.convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


_MAX_HEADERS = 20_000


class ImageHeaderCheck:
    """Headers that have been read.

    Args:
        rejected: Takes the samples whose pictures are not sound.
        max_megapixels: Largest picture that is decoded.

    Attributes:
        sizes: Width and height in pixels of the pictures whose headers were read and are sound.
    """

    def __init__(self, rejected: RejectedSamples, max_megapixels: float) -> None:
        self._rejected, self._max_megapixels = rejected, max_megapixels
        self._faults: dict[Path, str | None] = {}
        self.sizes: dict[Path, tuple[int, int]] = {}

    def with_valid_headers(self, samples: Sequence[Sample]) -> Iterator[Sample]:
        """The samples whose pictures can be used, as far as their headers tell."""
        for sample in samples:
            fault = next((fault for path in sample.images if (fault := self._fault(path))), None)
            if fault is None:
                yield sample
            else:
                self._rejected.add([Rejection(sample.origin, fault)])

    def _fault(self, path: Path) -> str | None:
        if path not in self._faults:
            if len(self._faults) >= _MAX_HEADERS:
                decide("data.preflight", f"{_MAX_HEADERS} image headers", "the others are checked as they are decoded")
                return None
            try:
                self.sizes[path] = check_header(path, self._max_megapixels)
                self._faults[path] = None
            except BadImage as error:
                self._faults[path] = str(error)
        return self._faults[path]
