"""Which columns of a row name its pictures and videos.

Data flow: a row -> ``image_columns``, ``video_columns`` -> the columns, and the values in them, in order.

The first kind of column that a row has is read: pictures (``image``, ``images``, ``jpg`` of a tar), numbered ones
(``image_1``, ``image_2``), a name or link of a file, and for questions and captions the id of a picture.
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from lightning_mm.data.readers.invalid_row import InvalidRow
from lightning_mm.data.readers.literals import list_of
from lightning_mm.data.readers.media import ENDINGS, VIDEO_ENDINGS, is_picture

_PICTURES = (
    "image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "image_bytes", "image_base64",
    "image_base64_str", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff",
)  # fmt: skip
_NUMBERED = re.compile(r"(?:image|img|picture)_?(\d+)")
_FILES = ("image_path", "image_paths", "img_path", "image_file", "image_files", "image_name", "imgname", "img_name",
          "image_filename", "image_file_name", "image_local_name", "file_name", "filename", "file_path", "filepath",
          "path", "file", "image_url", "image_urls", "imageurl", "img_url", "url")  # fmt: skip
_LINKS = frozenset({"image_url", "image_urls", "imageurl", "img_url"})
"""Those that name a picture even where a link has no suffix."""
_WITH_PICTURES = re.compile(r"image|img|picture|photo|figure|screenshot|frame")
_NO_PICTURES = re.compile(r"mask|depth|seg|thumb|heatmap|rejected|output|target|edited|generated")
_IDS = ("image_id", "imageid", "img_id")
_VIDEOS = ("video", "videos", "mp4", "webm", "avi", "mkv", "mov", "video_bytes")
_VIDEO_FILES = ("video_path", "video_paths", "video_file", "video_name", "video_url")
_AUDIO = ("audio", "audios", "wav", "mp3", "flac", "audio_path", "audio_paths")


def image_columns(row: Mapping[str, Any], with_ids: bool) -> tuple[list[str], list[Any]]:
    """The columns that hold or name the pictures of a row, and their values.

    Args:
        row: The row.
        with_ids: Whether the id of a picture stands for it where nothing else does, as in files of questions.

    Raises:
        InvalidRow: Two columns hold pictures.
    """
    keys = _keys(row)
    given = [keys[name] for name in _PICTURES if name in keys and not isinstance(row[keys[name]], bool)]
    if len(given) > 1:
        raise InvalidRow(f"two image lists: both {given[0]!r} and {given[1]!r} are given")
    if given:
        return given, values_of(row[given[0]])
    if numbered := sorted((int(match[1]), key) for name, key in keys.items() if (match := _NUMBERED.fullmatch(name))):
        return [key for _, key in numbered], [row[key] for _, key in numbered]
    for name in _FILES:
        if name not in keys or not (values := values_of(row[keys[name]])):
            continue
        if all(_is_file(value) or (name in _LINKS and is_link(value)) for value in values):
            return [keys[name]], values
    if unnamed := _unnamed_pictures(row, with_ids):
        return unnamed, [value for column in unnamed for value in values_of(row[column])]
    for name in _IDS:
        if with_ids and name in keys and isinstance(row[keys[name]], (str, int)):
            return [keys[name]], [ImageId(row[keys[name]])]
    return [], []


def video_columns(row: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
    """The columns that hold or name the videos of a row, and their values.

    Raises:
        InvalidRow: Two columns hold videos, or one holds audio.
    """
    keys = _keys(row)
    if audio := next((keys[name] for name in _AUDIO if name in keys), None):
        raise InvalidRow(f"audio: the row has {audio!r}, and audio is not trained on")
    given = [keys[name] for name in _VIDEOS if name in keys and not isinstance(row[keys[name]], (bool, int, float))]
    if len(given) > 1:
        raise InvalidRow(f"two video lists: both {given[0]!r} and {given[1]!r} are given")
    if given:
        return given, values_of(row[given[0]])
    for name in _VIDEO_FILES:
        if name in keys and (values := values_of(row[keys[name]])):
            return [keys[name]], values
    return [], []


def _unnamed_pictures(row: Mapping[str, Any], with_names: bool) -> list[str]:
    """Columns with other names that hold pictures (screenshot, image_left, Figure_path), in order of the row.

    Args:
        row: The row, which has no picture in a column of a known name.
        with_names: Whether the name of a picture is enough; if not, only its content is.
    """
    found = []
    for column, value in row.items():
        word = column.casefold()
        if _NO_PICTURES.search(word) or word in (*_VIDEOS, *_VIDEO_FILES) or value is None or value == []:
            continue
        named = with_names and _WITH_PICTURES.search(word) is not None and "://" not in str(value)[:4096]
        values = values_of(value)
        if values and all(is_picture(each) or (named and _is_file(each)) for each in values):
            found.append(column)
    return found


class ImageId(str):
    """The id of a picture, whose file has it in its name."""

    def __new__(cls, value: str | int) -> "ImageId":
        """The id as text."""
        return super().__new__(cls, str(value))

    def names(self) -> list[str]:
        """File names that such a picture may have: its id, or COCO's 12 digits, with each suffix."""
        stems = [str(self), f"{int(self):012d}"] if self.isdecimal() else [str(self)]
        return [stem + ending for stem in stems for ending in ("", ".jpg", ".png", ".jpeg", ".webp")]


def values_of(value: Any) -> list[Any]:
    """The pictures of one column: itself, its elements, or those of a list in JSON text."""
    if isinstance(value, str) and value[:1] == "[" and (decoded := list_of(value)) is not None:
        value = decoded
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value]


def _keys(row: Mapping[str, Any]) -> dict[str, str]:
    """Column names in lower case -> as they are, of the columns that hold something."""
    return {key.casefold(): key for key, value in row.items() if value is not None and value != "" and value != []}


def _is_file(value: Any) -> bool:
    """Whether a column of names means pictures here: a file name with a picture's suffix."""
    name = value.partition("?")[0] if isinstance(value, str) else ""
    return PurePosixPath(name).suffix.lower() in ENDINGS if len(name) < 4096 else False


def is_link(value: Any) -> bool:
    """Whether a value is a link to a page or file of the network."""
    return isinstance(value, str) and value.startswith(("http://", "https://"))


def is_video(name: str) -> bool:
    """Whether a file name is that of a video."""
    return PurePosixPath(name).suffix.lower() in VIDEO_ENDINGS
