"""Videos as frames: evenly spaced in time, decoded within limits to 8-bit RGB, or a reason why not.

A video is a file (decoded by PyAV, the extra ``video``), an animated GIF, WebP or PNG, or a folder of pictures in the
order of their names. It is cut into as many equal parts as frames are wanted, and the frame in the middle of each part
is taken, each frame once; a shorter video gives fewer. Between distant frames the decoder jumps to the keyframe before
the next one, so a long file is never decoded as a whole. Formats that name other files or addresses (playlists) are not
opened.

Data flow: path or bytes -> ``load`` (``collator``, in the loader's workers) -> frames -> an image mark each (``chat``).
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_mm.core.errors import UserError
from lightning_mm.data import images
from lightning_mm.data.image_source import ImageSource
from lightning_mm.data.images import BadImage

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,ogg,asf"
"""Names of FFmpeg's demuxers that may open a file: none of them follows a reference to another."""
MAX_SECONDS = 4 * 3600
_MAX_DECODED = 10_000
_MAX_ANIMATION = 5000
_FORWARD_SECONDS = 10
_MAX_STILL_SECONDS = 2
_MAX_CHECKED = 64
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def load(video: ImageSource, num_frames: int, max_megapixels: float = 40.0) -> list[Image.Image]:
    """Evenly spaced frames of a video, in order: mode RGB, 8 bit, upright; at least one.

    Args:
        video: The file or folder, or where its content is.
        num_frames: Number of frames; a video with fewer gives all.
        max_megapixels: Limit on width times height of a frame, in megapixels.

    Raises:
        BadImage: Not a video, outside the limits, truncated or damaged.
        UserError: It needs PyAV, which is not installed.
    """
    if isinstance(video, Path) and video.is_dir():
        return [images.load(file, max_megapixels).image for file in _pictures(video, num_frames)]
    if _is_animation(video):
        return _frames_of_animation(video, num_frames, max_megapixels)
    return [_upright(frame) for frame in _decode(video, num_frames, max_megapixels)]


def check_header(video: ImageSource, num_frames: int, max_megapixels: float = 40.0) -> list[tuple[int, int]]:
    """Width and height of the frames that ``load`` would give.

    They are those of the first frame. Their number is an estimate for a file whose header does not say it.

    Args:
        video: As for ``load``.
        num_frames: As for ``load``.
        max_megapixels: As for ``load``.

    Raises:
        BadImage: As for ``load``, as far as the first frame shows it.
        UserError: It needs PyAV, which is not installed.
    """
    if isinstance(video, Path) and video.is_dir():
        return [images.check_header(file, max_megapixels) for file in _pictures(video, num_frames)]
    if _is_animation(video):
        with images.opened(video, max_megapixels) as animation:
            return [animation.size] * min(num_frames, getattr(animation, "n_frames", 1))
    with _stream(video, max_megapixels) as (container, stream):
        first = _first_frame(video, container, stream)
        return [_upright(first).size] * min(num_frames, stream.frames or num_frames)


def can_decode(video: ImageSource) -> bool:
    """Whether a video can be looked at here: PyAV is installed, or it is none of the files that need it."""
    try:
        if (isinstance(video, Path) and not video.is_file()) or _is_animation(video):
            return True
    except BadImage:
        return True
    return importlib.util.find_spec("av") is not None


def require_decoder() -> None:
    """Refuse to go on without PyAV.

    Raises:
        UserError: It is not installed.
    """
    _pyav()


def check_video(video: ImageSource, max_megapixels: float) -> tuple[int, int]:
    """Width and height of a video that can be opened, and whose first frame decodes (of an animation, one frame).

    Of a folder, up to 64 pictures are looked at. A larger video than the limit is not decoded.

    Args:
        video: As for ``load``.
        max_megapixels: No larger frame is decoded, in megapixels.

    Raises:
        BadImage: As for ``load``, as far as this shows it; the limit on the size is not one of the reasons.
        UserError: It needs PyAV, which is not installed.
    """
    if isinstance(video, Path) and video.is_dir():
        pictures = _pictures(video, _MAX_CHECKED)
        sizes = [images.check_image(file, max_megapixels, decode=False) for file in pictures]
        return max(sizes, key=lambda size: size[0] * size[1])
    if _is_animation(video):
        with images.opened(video, float("inf")) as animation:
            size = animation.size
        if size[0] * size[1] <= max_megapixels * 1e6:
            _frames_of_animation(video, 1, max_megapixels)
        return size
    with _stream(video, float("inf")) as (container, stream):
        size = (stream.codec_context.width, stream.codec_context.height)
        if size[0] * size[1] > max_megapixels * 1e6:
            return size
        _checked_span(video, container, stream)
        return _upright(_first_frame(video, container, stream)).size


def _first_frame(video: ImageSource, container: Any, stream: Any) -> Any:
    if (first := next(iter(container.decode(stream)), None)) is None:
        raise BadImage(video, "video does not decode: it has no frame")
    return first


def _pictures(folder: Path, num_frames: int) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
    if not files:
        raise BadImage(folder, "not a video: the folder holds no pictures")
    return [files[at] for at in _spread(len(files), num_frames)]


def _spread(available: int, wanted: int) -> list[int]:
    """Indices of the middle ones of ``wanted`` equal parts; all where there are no more."""
    count = min(available, wanted)
    return [int((i + Fraction(1, 2)) * available / count) for i in range(count)]


def _is_animation(video: ImageSource) -> bool:
    try:
        if isinstance(video, Path):
            with video.open("rb") as file:
                head = file.read(12)
        else:
            head = video.read_bytes()[:12]
    except OSError as error:
        raise BadImage(video, f"missing video: {video.name}") from error
    return head.startswith((b"GIF8", b"\x89PNG")) or (head.startswith(b"RIFF") and head.endswith(b"WEBP"))


def _frames_of_animation(video: ImageSource, num_frames: int, max_megapixels: float) -> list[Image.Image]:
    with images.opened(video, max_megapixels) as animation:
        try:
            available = getattr(animation, "n_frames", 1)
            if available > _MAX_ANIMATION:
                raise BadImage(video, f"video too long: {available} frames, the limit is {_MAX_ANIMATION}")
            frames = []
            for at in _spread(available, num_frames):
                animation.seek(at)
                frames.append(images.to_rgb(video, animation))
            return frames
        except BadImage:
            raise
        except images.DECODE_ERRORS as error:
            raise BadImage(video, f"video does not decode: {error}") from error


def _decode(video: ImageSource, num_frames: int, max_megapixels: float) -> list[Any]:
    """PyAV's frames at the middles of ``num_frames`` equal parts of the video's time."""
    with _stream(video, max_megapixels) as (container, stream):
        start, seconds = _checked_span(video, container, stream)
        targets = [start + (i + Fraction(1, 2)) * seconds / num_frames for i in range(num_frames)]
        frames = _frames_at(video, container, stream, targets)
    if not frames:
        raise BadImage(video, "video does not decode: it has no frame")
    for frame in frames:
        images.check_size(video, (frame.width, frame.height), max_megapixels)
    return frames


@contextmanager
def _stream(video: ImageSource, max_megapixels: float) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and its first stream of moving pictures, whose size is within the limits."""
    av = _pyav()
    try:
        with (
            video.open("rb") if isinstance(video, Path) else BytesIO(video.read_bytes()) as file,
            _open(av, file) as container,
        ):
            if not container.streams.video:
                raise BadImage(video, "not a video: the file holds no moving pictures")
            stream = container.streams.video[0]
            images.check_size(video, (stream.codec_context.width, stream.codec_context.height), max_megapixels)
            yield container, stream
    except BadImage:
        raise
    except (av.FFmpegError, OSError, ValueError, EOFError) as error:
        raise BadImage(video, f"video does not decode: {error}") from error


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(
            "The data has videos, which need the package av.",
            "It is not installed.",
            "pip install 'lightning-mm[video]', or leave the rows with videos out.",
        ) from error
    return av


def _open(av: Any, file: Any) -> Any:
    def refuse(url: str, *_: Any) -> Any:
        raise OSError(f"it names another file: {url}")

    return av.open(file, io_open=refuse, options={"format_whitelist": CONTAINERS}, metadata_errors="replace")


def _checked_span(video: ImageSource, container: Any, stream: Any) -> tuple[Fraction, Fraction]:
    start, seconds = _span(container, stream)
    if seconds > MAX_SECONDS:
        raise BadImage(video, f"video too long: {float(seconds):.0f} s, the limit is {MAX_SECONDS} s")
    return start, seconds


def _span(container: Any, stream: Any) -> tuple[Fraction, Fraction]:
    """Start and length of the stream in seconds; its packets are read, not decoded, where the header does not say."""
    start = Fraction(stream.start_time or 0) * stream.time_base
    if stream.duration:
        return start, stream.duration * stream.time_base
    if container.duration:
        return start, Fraction(container.duration, 1_000_000)
    ends = [packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None]
    container.seek(0)
    return start, max(ends, default=0) * stream.time_base - start


def _frames_at(video: ImageSource, container: Any, stream: Any, targets: Sequence[Fraction]) -> list[Any]:
    """The frame that is shown at each time, each frame once."""
    shown: list[Any] = []
    decoded = 0
    for run in _runs(targets):
        container.seek(int(run[0] / stream.time_base), stream=stream)  # to the keyframe before
        wanted, last = list(run), None
        for frame in container.decode(stream):
            decoded += 1
            if decoded > _MAX_DECODED:
                raise BadImage(video, f"video has too few keyframes: more than {_MAX_DECODED} frames to decode")
            time = Fraction(frame.pts or 0) * stream.time_base
            while wanted and time > wanted[0]:
                shown.append(last or frame)
                wanted.pop(0)
            last = frame
            if not wanted:
                break
        if wanted and last is not None:  # the last frame is shown until the end
            end = Fraction(last.pts + (last.duration or 0)) * stream.time_base
            if len(wanted) > 1 and wanted[-1] > end + _MAX_STILL_SECONDS:
                raise BadImage(video, f"video is cut short: its frames end at {float(end):.1f} s")
            shown.append(last)
    return [frame for i, frame in enumerate(shown) if i == 0 or frame.pts != shown[i - 1].pts]


def _runs(targets: Sequence[Fraction]) -> list[list[Fraction]]:
    """Times in groups: within a group the decoder goes on, between groups it jumps."""
    runs = [[targets[0]]]
    for before, target in pairwise(targets):
        if target - before > _FORWARD_SECONDS:
            runs.append([])
        runs[-1].append(target)
    return runs


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    turned = int(getattr(frame, "rotation", 0))
    return image.rotate(turned, expand=True) if turned else image
