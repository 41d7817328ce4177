"""Pictures and videos in the forms that rows hold them in.

Data flow: a value of a row (path, bytes, base64 or data URI, ``{bytes, path}``, link, PIL image) -> ``MediaReader`` ->
``Path`` below the image root or ``ImageBytes``; ``InvalidRow`` with the reason.
"""

import base64
import binascii
import io
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from lightning_mm.data.image_source import ImageBytes
from lightning_mm.data.readers.fetching import Fetcher
from lightning_mm.data.readers.image_root import ImageRoot
from lightning_mm.data.readers.invalid_row import InvalidRow, kind_of

ENDINGS = frozenset({
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif",
})  # fmt: skip
"""Suffixes of pictures."""
VIDEO_ENDINGS = frozenset({".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".gif"})
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
_BASE64 = ("/9j/", "_9j_", "iVBORw0KGg", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0AK")
"""How base64 of pictures begins: JPEG, PNG, GIF, WebP, BMP, TIFF."""
_CONTENT = ("bytes", "base64", "b64_json", "data", "image_base64")
_PLACE = ("path", "url", "image", "video", "image_url", "video_url", "file", "file_name", "filename", "fileUri",
          "file_uri", "source", "image_path")  # fmt: skip


def is_picture(value: Any) -> bool:
    """Whether a value is the content of a picture, as bytes or as ``{bytes, path}`` of ``datasets``."""
    content = value.get("bytes") if isinstance(value, Mapping) else value
    return isinstance(content, (bytes, bytearray)) and bytes(content[:8]).startswith(_MAGIC)


class MediaReader:
    """Finds what rows show.

    Args:
        root: Folder that paths are relative to.
        fetcher: Downloads links; None refuses them.
    """

    def __init__(self, root: ImageRoot, fetcher: Fetcher | None = None) -> None:
        self._root, self._fetcher = root, fetcher

    def read(self, value: Any, name: str, what: str = "image") -> Path | ImageBytes:
        """A picture or a video.

        Args:
            value: What the row gives for it.
            name: What to call it in messages if it has no name of its own.
            what: "image" or "video".

        Raises:
            InvalidRow: There is no such file, it is not allowed, or the value is of no known form.
        """
        if isinstance(value, str):
            return self._named(value, name, what)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return ImageBytes(name, bytes(value))
        if isinstance(value, Mapping):
            return self._described(value, name, what)
        if isinstance(value, Image.Image):
            file = io.BytesIO()
            value.save(file, "PNG")  # lossless
            return ImageBytes(f"{name}.png", file.getvalue())
        if isinstance(value, Path):
            return self._root.resolve(str(value), what == "video")
        if isinstance(value, list) and what == "video":
            raise InvalidRow(f"video as frames: a list of {len(value)} pictures; give a video file, or images")
        raise InvalidRow(f"wrong type: {what!r} is {kind_of(value)}, not text")

    def _described(self, value: Mapping[str, Any], name: str, what: str) -> Path | ImageBytes:
        place = next((value[key] for key in _PLACE if value.get(key) is not None), None)
        content = next((value[key] for key in _CONTENT if value.get(key) is not None), None)
        named = PurePosixPath(place).name if isinstance(place, str) and len(place) < 1000 and place else name
        if isinstance(content, (bytes, bytearray, memoryview)):
            return ImageBytes(named or name, bytes(content))
        if isinstance(content, str):
            return (
                self.read(content, named, what) if content[:5].casefold() == "data:" else _decoded(content, named, what)
            )
        if isinstance(content, list) and all(type(each) is int and 0 <= each < 256 for each in content):
            return ImageBytes(named or name, bytes(content))  # bytes that went through JSON
        if place is None or content is not None:
            raise InvalidRow(f"wrong type: {what!r} is an object with {sorted(value)}, and holds no path and no bytes")
        return self.read(place, name, what)

    def _named(self, value: str, name: str, what: str) -> Path | ImageBytes:
        if value[:5].casefold() == "data:":
            head, comma, content = value.partition(",")
            if not comma or not head.casefold().endswith(";base64"):
                raise InvalidRow(f"invalid base64: {value[:40]!r} is no data URI in base64")
            return _decoded(content, name, what)
        if value.startswith("file://"):
            return self._root.resolve(unquote(urlsplit(value).path), what == "video")
        if value.startswith(("http://", "https://")) and self._fetcher is not None:
            return self._fetcher.fetch(value, what)
        if value.startswith(("http://", "https://")):
            raise InvalidRow(
                f"{what} is a URL: {value[:80]!r}, nothing is fetched from the network; download it first, or give "
                "data.fetch true"
            )
        if len(value) > 100 and value.startswith(_BASE64) and (picture := _picture_in_base64(value)) is not None:
            return ImageBytes(name, picture)
        return self._root.resolve(value, what == "video")


def _decoded(text: str, name: str, what: str) -> ImageBytes:
    try:
        return ImageBytes(name, _bytes_of(text))
    except (ValueError, binascii.Error) as error:
        raise InvalidRow(f"invalid base64: the {what} {name!r} does not decode, {error}") from error


def _bytes_of(text: str) -> bytes:
    """The bytes of base64 in either alphabet, with white space in it and the padding left out or not."""
    packed = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"})
    return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)


def _picture_in_base64(text: str) -> bytes | None:
    try:
        content = _bytes_of(text)
    except ValueError:
        return None
    return content if content.startswith(_MAGIC) else None
