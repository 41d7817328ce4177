"""Pictures that cannot be used are found before a run, also after they changed; others are left alone."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_mm.core.errors import UserError
from lightning_mm.data import picture_check
from lightning_mm.data.images import BadImage, check_image, load
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.split import Split, SplitOptions, open_split

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


def open_file(folder: Path, names: list[str], limit: float = 1.0, **options: Any) -> tuple[Split, dict[str, str]]:
    (folder / "t.json").write_text(json.dumps(rows(names)))
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
