"""Image files: headers checked before a run, pixels decoded within limits to 8-bit RGB, or a reason why not.

Checked on the header before a pixel is decoded: only formats whose decoders run in this process (EPS would start
Ghostscript); at most ``max_megapixels``; no side under 4 pixels, where rows and color channels of an array cannot be
told apart; no side more than 100 times the other, since resizing to a fixed short side would enlarge it too much. Then
the whole file must decode; EXIF rotation is applied; transparency is put on white; 16-bit grayscale keeps its high
byte; of an animation the first frame is used.

Data flow: Samples -> ``ImageHeaderCheck`` (``datamodule``) -> Samples with valid headers, others to
``RejectedSamples``; path -> ``load`` (``collator``, in the loader's workers) -> ``DecodedImage``.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from warnings import catch_warnings, simplefilter

from PIL import ExifTags, Image, ImageFile, ImageOps

from lightning_mm.core.decisions import log_decision
from lightning_mm.data.image_source import ImageSource
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.sample import Rejection, Sample

Image.init()
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)
MIN_SIDE = 4
MAX_ASPECT = 100
_ON_ITS_SIDE = range(5, 9)
# What PIL's decoders raise on malformed files.
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
    """An image that cannot be used.

    Args:
        path: The image.
        reason: ``category: detail``, as rejections are counted.
    """

    def __init__(self, path: ImageSource, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.reason} ({self.path.name})"


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
    with _open(path, max_megapixels) as image:
        width, height = image.size
        # Without "exif", getexif() would decode a whole PNG to look behind its pixels.
        is_turned = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) in _ON_ITS_SIDE
        return (height, width) if is_turned else (width, height)


def load(path: ImageSource, max_megapixels: float = 40.0) -> DecodedImage:
    """The decoded image.

    Args:
        path: The file, or where its content is.
        max_megapixels: Limit on width times height, in megapixels.

    Raises:
        BadImage: Not an image, outside the limits, truncated or damaged.
    """
    with _open(path, max_megapixels) as image:
        try:
            with _whole_files_only():
                # The second frame of an MPO is a camera's by-product (gain map, stereo view).
                is_animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
                image.load()
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            return DecodedImage(_to_rgb(path, ImageOps.exif_transpose(image)), is_animated, is_turned)
        except BadImage:
            raise
        except _DECODE_ERRORS as error:
            raise BadImage(path, f"image does not decode: {error}") from error


@contextmanager
def _open(path: ImageSource, max_megapixels: float) -> Iterator[Image.Image]:
    try:
        with catch_warnings():
            # PIL warns from 89 megapixels on; our own limit is checked next.
            simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path if isinstance(path, Path) else BytesIO(path.read_bytes()), formats=FORMATS)
    except _DECODE_ERRORS as error:
        raise BadImage(path, _why_not_opened(path, error)) from error
    with image:
        _check_size(path, image.size, max_megapixels)
        yield image


def _why_not_opened(path: ImageSource, error: Exception) -> str:
    if isinstance(path, Path) and not path.is_file():
        return f"missing image: {path.name}"
    if isinstance(error, Image.DecompressionBombError):
        return f"image too large: {error}"
    if not path.read_bytes()[:1]:
        return "not an image: the file is empty"
    return f"not an image: {error}"


def _check_size(path: ImageSource, size: tuple[int, int], max_megapixels: float) -> None:
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


def _to_rgb(path: ImageSource, image: Image.Image) -> Image.Image:
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


_MAX_HEADERS = 20_000


class ImageHeaderCheck:
    """Reads the header of each image once and rejects samples whose images cannot be used.

    Args:
        rejected: Takes the samples that are rejected.
        max_megapixels: Limit on the size of an image, in megapixels.

    Attributes:
        sizes: Width and height in pixels of every image with a valid header.
    """

    def __init__(self, rejected: RejectedSamples, max_megapixels: float) -> None:
        self._rejected, self._max_megapixels = rejected, max_megapixels
        self._faults: dict[ImageSource, str | None] = {}
        self.sizes: dict[ImageSource, tuple[int, int]] = {}

    def with_valid_headers(self, samples: Sequence[Sample]) -> Iterator[Sample]:
        """The samples whose images all have valid headers."""
        for sample in samples:
            fault = next((fault for path in sample.images if (fault := self._fault(path))), None)
            if fault is None:
                yield sample
            else:
                self._rejected.add([Rejection(sample.origin, fault)])

    def _fault(self, path: ImageSource) -> str | None:
        if path not in self._faults:
            if len(self._faults) >= _MAX_HEADERS:
                log_decision(
                    "data.preflight", f"{_MAX_HEADERS} image headers", "the others are checked as they are decoded"
                )
                return None
            try:
                self.sizes[path] = check_header(path, self._max_megapixels)
                self._faults[path] = None
            except BadImage as error:
                self._faults[path] = str(error)
        return self._faults[path]
