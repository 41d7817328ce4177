"""Pictures that cannot be used are found before a run, also after they changed; others are left alone."""

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from lightning_mm.core.errors import UserError
from lightning_mm.data import picture_check, videos
from lightning_mm.data.images import BadImage, check_image, load
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.split import Split, SplitOptions, open_split
from tests.helpers.videos import write_video

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm"}


def picture(format: str, size: tuple[int, int] = (64, 48)) -> bytes:
    image = Image.effect_noise(size, 90).convert("P" if format == "GIF" else "RGB")
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_ends_too_early(format: str, decode: bool, tmp_path: Path) -> None:
    """What ``load`` refuses for its end, the check refuses too; what it takes, the check takes."""
    content = picture(format)
    path = tmp_path / f"a.{FORMATS[format]}"
    path.write_bytes(content)
    assert check_image(path, 40.0, decode) == (64, 48)
    for kept in (0.3, 0.6, 0.95):
        path.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(BadImage) as in_run:
            load(path)
        with pytest.raises(BadImage) as before:
            check_image(path, 40.0, decode)
        assert before.value.reason.partition(":")[0] == in_run.value.reason.partition(":")[0]


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_behind_the_end_are_no_fault(format: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(picture(format) + b"\0" * 500 + b"more")
    load(path)
    assert check_image(path, 40.0, False) == (64, 48)


def test_a_bomb_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (3000, 3000)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-20])
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert check_image(tmp_path / "a.png", 1.0, True) == (3000, 3000)


def rows(names: list[str]) -> list[dict[str, Any]]:
    said = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "That."}]
    return [{"id": name, "image": name, "conversations": said} for name in names]


def of_videos(names: list[str]) -> list[dict[str, Any]]:
    said = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "That."}]
    return [{"id": name, "video": name, "conversations": said} for name in names]


def open_file(
    folder: Path, names: list[str], limit: float = 1.0, make: Any = rows, **options: Any
) -> tuple[Split, dict[str, str]]:
    (folder / "t.json").write_text(json.dumps(make(names)))
    rejected = RejectedSamples(limit)
    options = {"cache": folder / "cache", **options}
    split = open_split("train", str(folder / "t.json"), SplitOptions(**options), rejected)
    return split, {each.origin: each.reason for each in rejected}


def test_what_is_mended_counts_and_what_breaks_falls_out(tmp_path: Path) -> None:
    good = picture("JPEG")
    (tmp_path / "a.jpg").write_bytes(good)
    (tmp_path / "b.jpg").write_bytes(good[:-200])
    split, found = open_file(tmp_path, ["a.jpg", "b.jpg", "a.jpg"])
    assert [sample.id for sample in split.samples] == ["a.jpg", "a.jpg"]
    assert list(found) == ["t.json:1[1]"]
    assert found["t.json:1[1]"].startswith("image does not decode: ")
    (tmp_path / "b.jpg").write_bytes(good)
    (tmp_path / "a.jpg").unlink()
    split, found = open_file(tmp_path, ["a.jpg", "b.jpg", "a.jpg"])
    assert [sample.id for sample in split.samples] == ["b.jpg"]
    assert set(found.values()) == {f"missing image: 'a.jpg' is not in {tmp_path} (a.jpg)"}


def test_a_picture_is_checked_once_while_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(picture("PNG"))
    open_file(tmp_path, ["a.png"])
    monkeypatch.setattr(picture_check, "check_image", lambda *_: pytest.fail("checked again"))
    split, _ = open_file(tmp_path, ["a.png"])
    assert len(split.samples) == 1


def test_the_limit_on_size_is_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("PNG", (1000, 600)))
    (tmp_path / "b.png").write_bytes(picture("PNG", (100, 60)))
    assert len(open_file(tmp_path, ["a.png", "b.png"])[0].samples) == 2
    split, found = open_file(tmp_path, ["a.png", "b.png"], max_megapixels=0.5)
    assert [sample.id for sample in split.samples] == ["b.png"]
    assert list(found.values()) == ["image too large: 1000 x 600 is over 0.5 megapixels"]
    assert len(open_file(tmp_path, ["a.png", "b.png"])[0].samples) == 2


def test_truncated_pictures_stop_a_run_before_it_starts(tmp_path: Path) -> None:
    good = picture("JPEG")
    names = [f"{index}.jpg" for index in range(100)]
    for index, name in enumerate(names):
        (tmp_path / name).write_bytes(good[:-100] if index % 20 == 0 else good)
    with pytest.raises(UserError, match=r"5 of 100 rows of data\.train cannot be used") as caught:
        open_file(tmp_path, names, 0.01)
    ledger = tmp_path / "cache" / "rejected-train.jsonl"
    assert str(ledger) in caught.value.fix
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [line["origin"] for line in lines] == [f"t.json:1[{index}]" for index in range(0, 100, 20)]
    assert {line["source"] for line in lines} == {str(tmp_path / "t.json")}


def video_files(folder: Path) -> dict[str, str]:
    """Videos, and the beginning of the reason why each cannot be used; '' for those that can."""
    good = write_video(folder / "good.mp4", 20).read_bytes()
    (folder / "cut.mp4").write_bytes(good[: len(good) // 3])
    (folder / "text.mp4").write_text("no video")
    with av.open(str(folder / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), "s16", "mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
    frames = [Image.new("RGB", (32, 32), (0, 0, 25 * i)) for i in range(10)]
    frames[0].save(folder / "good.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "still.png")
    for name in ("frames", "bad_frames", "no_frames"):
        (folder / name).mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / "frames" / f"{number}.png")
    (folder / "bad_frames" / "0.png").write_bytes((folder / "frames" / "0.png").read_bytes()[:40])
    return {
        "good.mp4": "", "good.gif": "", "still.png": "", "frames": "", "cut.mp4": "video does not decode",
        "text.mp4": "video does not decode", "sound.mkv": "not a video", "bad_frames": "not an image",
        "no_frames": "not a video", "missing.mp4": "missing video",
    }  # fmt: skip


def test_videos_are_checked_as_they_are_loaded(tmp_path: Path) -> None:
    expected = video_files(tmp_path)
    split, found = open_file(tmp_path, list(expected), make=of_videos)
    assert [sample.id for sample in split.samples] == [name for name, reason in expected.items() if not reason]
    reasons = {name: found.get(f"t.json:1[{index}]", "") for index, name in enumerate(expected)}
    assert {name: reason.partition(":")[0] for name, reason in reasons.items()} == expected
    for name, reason in expected.items():
        if not reason:
            assert videos.load(tmp_path / name, 4)
            continue
        with pytest.raises(BadImage) as in_run:
            videos.load(tmp_path / name, 4)
        assert str(in_run.value).partition(":")[0] == reason


def test_a_video_is_checked_once_while_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, reason in video_files(tmp_path).items() if not reason]
    open_file(tmp_path, names, make=of_videos)
    with monkeypatch.context() as patch:
        patch.setattr(picture_check, "check_video", lambda *_: pytest.fail("checked again"))
        assert len(open_file(tmp_path, names, make=of_videos)[0].samples) == len(names)
    (tmp_path / "good.mp4").write_bytes(b"damaged")
    (tmp_path / "frames" / "0.png").write_bytes(b"damaged")
    _, found = open_file(tmp_path, names, make=of_videos)
    assert len(found) == 2


def test_the_limit_on_the_size_of_a_video_is_of_the_run(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 5)
    write_video(tmp_path / "b.mp4", 5, size=(128, 96))
    for limit, kept in ((1.0, ["a.mp4", "b.mp4"]), (0.01, ["a.mp4"]), (1.0, ["a.mp4", "b.mp4"])):
        split, found = open_file(tmp_path, ["a.mp4", "b.mp4"], make=of_videos, max_megapixels=limit)
        assert [sample.id for sample in split.samples] == kept
        assert len(found) == 2 - len(kept)
