"""Frames of videos: which ones, from which kinds of files, and what is refused with its reason."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_mm.core.errors import UserError
from lightning_mm.data import videos
from lightning_mm.data.image_source import ImageBytes
from lightning_mm.data.images import BadImage
from tests.helpers.videos import CODECS, frame_numbers, write_video

MIDDLES = [6.25, 18.75, 31.25, 43.75, 56.25, 68.75, 81.25, 93.75]
"""Middles of 8 equal parts of 100 frames."""


@pytest.mark.parametrize("kind", CODECS)
def test_frames_are_evenly_spaced(tmp_path: Path, kind: str) -> None:
    file = write_video(tmp_path / f"a.{kind}", 100)
    for video in (file, ImageBytes("row 3", file.read_bytes())):
        frames = videos.load(video, 8)
        # A frame more or less by where its time begins, and one by the codec's loss.
        assert np.abs(np.array(frame_numbers(frames, 100)) - MIDDLES).max() <= 2
        assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (64, 48))}
        assert videos.check_header(video, 8) == [(64, 48)] * 8


@pytest.mark.parametrize("num_frames", [1, 3])
def test_a_short_video_gives_each_frame_once(tmp_path: Path, num_frames: int) -> None:
    file = write_video(tmp_path / "a.mp4", num_frames)
    assert np.allclose(frame_numbers(videos.load(file, 8), num_frames), range(num_frames), atol=0.1)
    assert len(videos.check_header(file, 8)) == num_frames


@pytest.mark.parametrize("keyframe_every", [50, 2000])
def test_a_long_video_is_not_decoded_as_a_whole(
    tmp_path: Path, keyframe_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_video(tmp_path / "a.mp4", 4000, keyframe_every=keyframe_every, size=(16, 16))
    found = frame_numbers(videos.load(file, 4), 4000)
    # One step of brightness is 16 frames.
    assert np.abs(np.array(found) - [500, 1500, 2500, 3500]).max() <= 32
    monkeypatch.setattr(videos, "_MAX_DECODED", 400)
    if keyframe_every == 50:
        assert len(videos.load(file, 4)) == 4
    else:
        with pytest.raises(BadImage, match="too few keyframes"):
            videos.load(file, 4)


def test_pictures_in_motion_and_in_folders(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), (0, 0, 25 * i)) for i in range(10)]
    for i, frame in enumerate(frames):
        (tmp_path / "frames").mkdir(exist_ok=True)
        frame.save(tmp_path / "frames" / f"{i:03}.png")
    (tmp_path / "frames" / "notes.txt").write_text("no picture")
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    for name in ("frames", "a.gif", "a.webp", "a.png"):
        found = videos.load(tmp_path / name, 5)
        assert [np.asarray(frame)[0, 0, 2] for frame in found] == [25, 75, 125, 175, 225], name
        assert videos.check_header(tmp_path / name, 5) == [(32, 32)] * 5
        assert len(videos.load(tmp_path / name, 40)) == 10


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = write_video(tmp_path / "a.webm", 100)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{video}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    (tmp_path / "list.mp4").write_text(playlist)
    (tmp_path / "text.mp4").write_text("no video at all")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.webm").write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    (tmp_path / "empty").mkdir()
    reasons = {
        "list.m3u8": "does not decode",
        "list.mp4": "does not decode",
        "text.mp4": "does not decode",
        "empty.mp4": "does not decode",
        "cut.webm": "cut short",
        "empty": "no pictures",
        "missing.mp4": "missing video",
    }
    for name, reason in reasons.items():
        with pytest.raises(BadImage, match=reason):
            videos.load(tmp_path / name, 8)
    with pytest.raises(BadImage, match="image too large"):
        videos.load(video, 8, max_megapixels=0.001)
    monkeypatch.setattr(videos, "MAX_SECONDS", 5)
    with pytest.raises(BadImage, match="video too long"):
        videos.load(video, 8)


def test_a_missing_decoder_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real = write_video(tmp_path / "a.mp4", 3), builtins.__import__

    def without_av(name: str, *args: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(UserError, match="package av") as caught:
        videos.load(file, 8)
    assert "lightning-mm[video]" in caught.value.fix
