"""``check``: what it says of the data is what a fit does with it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lightning_mm
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import TokenRegion
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.verbs.check import check
from tests.helpers.data import Data, Family, make_rows


@pytest.fixture
def faulty(tmp_path: Path) -> dict[str, Path]:
    """Rows that the reader, the picture check, the template and the length drop; and val with rows of train."""
    folder = tmp_path / "faulty"
    rows = make_rows(folder, 12)
    rows[1]["image"] = "missing.png"
    rows[2]["conversations"][1]["value"] = "It is <pad>."
    rows[3]["conversations"][0]["value"] = "<image>\n" + "long " * 3000
    rows[4]["conversations"] = rows[4]["conversations"][:1]
    (folder / rows[5]["image"]).write_bytes(b"no picture")
    rows[6]["conversations"][-1]["value"] = "It goes on" + " and on" * 400
    rows[7]["note"] = "not read"
    rows.append(rows[0])
    val = make_rows(folder, 4, seed=1)
    for index, row in enumerate(val):
        Image.new("RGB", (60 + index, 36)).save(folder / row["image"])
    val[0] = rows[8]
    (folder / "copy.png").write_bytes((folder / rows[9]["image"]).read_bytes())
    val[1]["image"] = "copy.png"
    files = {"train": folder / "train.json", "val": folder / "val.json"}
    files["train"].write_text(json.dumps(rows))
    files["val"].write_text(json.dumps(val))
    return files


def options(files: dict[str, Path], **more: Any) -> MMDataModule:
    return MMDataModule(**{split: str(path) for split, path in files.items()}, num_workers=0, **more)


def test_rows_and_reasons_are_those_of_a_fit(family: Family, faulty: dict[str, Path]) -> None:
    """The reference is every batch of an epoch, one row each, and the rejections that come with them."""
    found = check(str(family("llava")), options(faulty, max_length=600, max_bad_fraction=1.0))
    data = options(faulty, max_length=600, max_bad_fraction=1.0, batch_size=1, processor=str(family("llava")))
    trained = set()
    for batch in data.train_dataloader():
        data.rejected_samples.add(batch.rejected, "train")
        trained |= {sample.origin for sample in batch.samples if batch.num_supervised}
    (train,) = (source for source in found.sources if source.split == "train")
    assert (train.read, train.used, train.dropped) == (13, len(trained), 13 - len(trained)) == (13, 8, 5)
    dropped = data.rejected_samples.dropped("train").values()
    assert Counter(each.reason.partition(":")[0] for each in dropped) == train.reasons
    assert {f"{each.origin}: {each.reason}" for each in dropped} == set(train.examples.values())
    assert train.cut == sum(each.kind == "cut" for each in data.rejected_samples) == 1
    assert found.error is None
    told = found.to_dict()
    assert told["rows"] == {"read": 17, "used": 12, "dropped": 5}
    assert sum(told["reasons"].values()) == 5
    assert [source["dropped"] for source in told["sources"]] == [5, 0]


def test_lengths_are_those_of_batches(family: Family, data: Data) -> None:
    found = check(str(family("qwen2_5_vl")), options(data, max_length=None))
    loaded = options(data, max_length=None, batch_size=12, processor=str(family("qwen2_5_vl")))
    (batch,) = loaded.train_dataloader()
    totals = (batch.regions != TokenRegion.PAD).sum(1).tolist()
    learned = (batch.regions == TokenRegion.ANSWER).sum(1).tolist()
    lengths = found.lengths["train"]
    for kind, expected in (("total", totals), ("supervised", learned)):
        assert lengths.tokens[kind]["min"] == min(expected)
        assert lengths.tokens[kind]["max"] == max(expected)
        assert lengths.tokens[kind]["median"] == pytest.approx(sorted(expected)[5] / 2 + sorted(expected)[6] / 2)
    assert (lengths.measured, lengths.cut, lengths.dropped) == (12, 0, 0)


def test_shares_over_the_limit(family: Family, faulty: dict[str, Path]) -> None:
    lengths = check(str(family("llava")), options(faulty, max_length=600)).lengths["train"]
    # 13 rows, of which the reader, the picture check and the template drop four: nine are tokenized.
    assert (lengths.measured, lengths.cut, lengths.dropped) == (9, pytest.approx(1 / 9), pytest.approx(1 / 9))


def test_duplicates_by_content(family: Family, faulty: dict[str, Path]) -> None:
    found = check(None, options(faulty))
    assert found.repeated == {"train": 1, "val": 0}
    overlap = found.overlaps["val"]
    assert (overlap.num_rows, overlap.rows, overlap.pictures) == (4, 1, 2), "a copied picture has another name"
    assert overlap.examples == (("val.json:1[0]", "train.json:1[8]"),)


def test_without_a_model_what_is_read_is_told(faulty: dict[str, Path]) -> None:
    found = check(None, options(faulty, max_bad_fraction=1.0))
    told = found.to_dict()
    assert set(told["reasons"]) == {"missing image", "no answer", "not an image"}
    assert (told["lengths"], told["samples"], told["max_length"]) == ({}, [], None)
    assert "read only" in str(found)


def test_a_dropped_majority_is_told_before_it_is_an_error(tmp_path: Path, family: Family) -> None:
    rows = make_rows(tmp_path, 8)
    for row in rows[:5]:
        row["conversations"][1]["value"] = "<pad>"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    found = check(str(family("llava")), tmp_path / "train.json")
    assert found.rows == {"read": 8, "used": 3, "dropped": 5}
    assert found.error is not None
    assert "5 of 8 rows of data.train cannot be used" in found.error.what
    assert found.samples
    assert found.to_dict()["error"] == str(found.error)


def test_nothing_that_can_be_used_is_told_too(tmp_path: Path, family: Family) -> None:
    rows = make_rows(tmp_path, 3)
    for row in rows:
        row["image"] = "missing.png"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    found = check(str(family("llava")), tmp_path / "train.json")
    assert found.rows == {"read": 3, "used": 0, "dropped": 3}
    assert "known with a model" not in str(found), "a model is named"
    assert found.error is not None
    assert "None of the 3 rows" in found.error.what


def test_samples_are_evenly_spaced_and_bounded(family: Family, data: Data) -> None:
    found = check(str(family("llava")), options(data), samples=2)
    assert [(s.split, s.row.sample.id) for s in found.samples if s.split == "train"] == [
        ("train", "row-0"),
        ("train", "row-11"),
    ]
    sample = found.to_dict()["samples"][0]
    turns = json.loads(data["train"].read_text())[0]["conversations"]
    assert sample["id"] == "row-0"
    assert sample["images"] == [[40, 36]]
    assert len(sample["supervised"]) == len(turns) / 2
    for turn in turns:
        assert (turn["value"].removeprefix("<image>\n") in sample["prompt"]) == (turn["from"] == "human")
    with pytest.raises(UserError, match="samples is -1"):
        check(str(family("llava")), data["train"], samples=-1)


def test_markup_and_control_characters_of_the_data_are_no_commands(tmp_path: Path, family: Family) -> None:
    rows = make_rows(tmp_path, 2)
    rows[0]["conversations"][0]["value"] = "<image>\n[bold]Well[/bold] [/] \x1b[31m?"
    rows[0]["conversations"][1]["value"] = "[red]It is[/red] <script>alert(1)</script> \u202eright"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    found = check(str(family("llava")), tmp_path / "train.json")
    printed = str(found)
    assert "[bold]Well[/bold] [/]" in printed
    assert "[red]It is[/red]" in printed
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    page = found.write_html(tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_several_sources_are_told_apart(tmp_path: Path, family: Family) -> None:
    for name in ("first", "second"):
        rows = make_rows(tmp_path / name, 4, seed=len(name))
        rows[0]["conversations"][1]["value"] = "<pad>" if name == "second" else "It is."
        (tmp_path / name / "rows.json").write_text(json.dumps(rows))
    data = MMDataModule(
        train=[{"path": str(tmp_path / name / "rows.json"), "name": name} for name in ("first", "second")]
    )
    found = lightning_mm.check(str(family("llava")), data)
    assert [(source.name, source.read, source.used) for source in found.sources] == [("first", 4, 4), ("second", 4, 3)]
    assert [source.reasons for source in found.sources] == [{}, {"special token in the text": 1}]
    assert {sample.source for sample in found.samples} == {"first", "second"}


def test_rows_beyond_a_limit_are_told_and_are_no_fault(tmp_path: Path, family: Family) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(make_rows(tmp_path, 8)))
    data = MMDataModule(train=[{"path": str(tmp_path / "rows.json"), "limit": 3}])
    found = check(str(family("llava")), data)
    assert found.rows == {"read": 8, "used": 3, "dropped": 5}
    assert found.sources[0].reasons == {"beyond the limit of the source": 5}
    assert found.sources[0].examples["beyond the limit of the source"].endswith(": limit 3")
    assert found.error is None


def test_streamed_rows_are_counted_all(tmp_path: Path, family: Family) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(make_rows(tmp_path, 80)))
    found = check(str(family("llava")), MMDataModule(train=str(tmp_path / "rows.json"), streaming=True))
    assert found.rows == {"read": 80, "used": 80, "dropped": 0}
    assert "data.streaming" in {decision.name for decision in found.decisions}


def test_rows_in_memory_are_data_too(tmp_path: Path, family: Family) -> None:
    rows, held_out = make_rows(tmp_path, 5), make_rows(tmp_path, 2, seed=1)
    found = lightning_mm.check(str(family("llava")), rows, val=held_out, image_root=tmp_path)
    assert found.rows == {"read": 7, "used": 7, "dropped": 0}


def test_a_module_and_a_loaded_model_are_models(family: Family, data: Data) -> None:
    module = lightning_mm.MMModule(str(family("llava")))
    by_path = check(str(family("llava")), options(data)).to_dict()
    assert check(module, options(data)).to_dict() == by_path
    assert not hasattr(module, "model"), "no weights are loaded"


def test_pictures_are_shown_as_they_are_trained(tmp_path: Path, family: Family) -> None:
    """A turned photo is shown upright, in the size that the model gets."""
    rows = make_rows(tmp_path, 1)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (90, 30)).save(tmp_path / "turned.jpg", exif=turned)
    rows[0]["image"] = "turned.jpg"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    found = check(str(family("llava")), tmp_path / "train.json")
    assert found.to_dict()["samples"][0]["images"] == [[30, 90]]
