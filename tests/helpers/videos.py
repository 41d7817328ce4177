"""Videos that tell which frame is which: frame ``i`` of ``n`` is gray of brightness ``255 * i / n``."""

from pathlib import Path

import av
import numpy as np
from PIL import Image

CODECS = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx", "avi": "mpeg4"}
"""An encoder for each kind of file."""


def write_video(
    path: Path, num_frames: int, *, fps: int = 10, keyframe_every: int = 12, size: tuple[int, int] = (64, 48)
) -> Path:
    """Write a video of gray frames that become brighter, encoded by the codec of its kind of file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix[1:]], rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = keyframe_every
        stream.codec_context.options = {"sc_threshold": "0"}  # no keyframe besides those
        for i in range(num_frames):
            pixels = np.full((size[1], size[0], 3), 255 * i // num_frames, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def frame_numbers(frames: list[Image.Image], num_frames: int) -> list[float]:
    """Which frame of ``num_frames`` each is, by its brightness."""
    return [float(np.asarray(frame).mean()) * num_frames / 255 for frame in frames]
