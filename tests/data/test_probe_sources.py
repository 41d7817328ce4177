"""Files of every form that probes are drawn from: what they say is read, what is wrong in them is in the ledger."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_mm.data.ledger import Ledger
from lightning_mm.data.probe_sets import ProbeSet
from lightning_mm.data.probing import file_for_probes, open_probe_set
from lightning_mm.data.probing.descriptions import description
from lightning_mm.data.probing.reading import Scenes, read_scenes
from lightning_mm.data.sample import Sample, Turn
from lightning_mm.decisions import decide
from lightning_mm.errors import UserError

Write = Callable[..., Path]
CAT = {"name": "cat", "category": "animal", "box": [1, 2, 11, 12]}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows, or anything else, as JSON; pictures 0.png to 9.png are there."""
    for i in range(10):
        Image.new("RGB", (40, 30), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")

    def make(told: Any, name: str = "rows.json") -> Path:
        path = tmp_path / name
        text = "\n".join(map(json.dumps, told)) if name.endswith("l") else json.dumps(told)
        path.write_text(text, encoding="utf-8")
        return path

    return make


def told(name: str) -> str:
    """The reason of the last decision of that name."""
    return [decision for decision in decide if decision.name == name][-1].reason


def opened(path: Path, **options: Any) -> ProbeSet:
    return open_probe_set(path, None, Ledger(0.5), **{"max_pictures": 64, **options})


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_the_row_format(write: Write, name: str) -> None:
    rows = [
        {"id": 7, "image": "0.png", "caption": " a  cat ", "false_captions": ["a dog"], "objects": [CAT], "group": 3},
        {"image": "1.png", "caption": ["a pet", "a cat here"], "objects": [CAT, {"name": "chair"}]},
        {"image": "2.png", "objects": []},
    ]
    found = read_scenes(write(rows, name))
    first, second, third = found.scenes
    assert not found.rejections
    assert (first.id, first.image.name, first.caption, first.false_captions) == ("7", "0.png", "a cat", ("a dog",))
    assert first.group == "3"
    assert first.objects is not None
    assert (first.objects[0].kinds, first.objects[0].box) == ({"name": "cat", "category": "animal"}, (1, 2, 11, 12))
    assert second.caption == "a cat here", "the first caption that names what is there"
    assert second.objects is not None
    assert [each.box for each in second.objects] == [(1, 2, 11, 12), None]
    assert (third.caption, third.objects) == ("", ())


BAD = {
    "not an object": ["a row"],
    "no picture": [{"caption": "a cat"}],
    "missing image": [{"image": "gone.png", "caption": "a cat"}],
    "image outside the image root": [{"image": "../../etc/hostname", "caption": "a cat"}],
    "image is a URL": [{"image": "https://example.org/a.png", "caption": "a cat"}],
    "wrong type": [{"image": "1.png", "caption": 7}, {"image": "1.png", "objects": "cat"}],
    "misplaced image mark": [{"image": "1.png", "caption": "<image> a cat"}],
    "object without a name": [{"image": "1.png", "objects": [{"box": [0, 0, 1, 1]}]}],
    "impossible box": [{"image": "1.png", "objects": [{**CAT, "box": box}]} for box in ([5, 5, 3, 9], [1, 2], "x")],
    "false caption is the true one": [{"image": "1.png", "caption": "A cat", "false_captions": ["a cat"]}],
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_rows_are_rejected_with_their_reason(write: Write, reason: str) -> None:
    good = {"image": "0.png", "caption": "a dog"}
    found = read_scenes(write([good, *BAD[reason]]))
    assert [scene.caption for scene in found.scenes] == ["a dog"]
    assert [each.reason.partition(":")[0] for each in found.rejections] == [reason] * len(BAD[reason])
    assert all(each.origin.startswith("rows.json:1[") for each in found.rejections)
    assert found.num_rows == 1 + len(BAD[reason])


def test_too_many_bad_rows_stop_the_run(write: Write) -> None:
    rows = [{"image": f"{i}.png", "caption": f"a thing {i}"} for i in range(5)]
    path = write([*rows, {"image": "gone.png", "caption": "a cat"}])
    ledger = Ledger(0.2)
    open_probe_set(path, None, ledger, max_pictures=8)
    assert (ledger.num_dropped, ledger.num_rows) == (1, 6)
    with pytest.raises(UserError, match="1 of 6 rows cannot be used"):
        open_probe_set(path, None, Ledger(0.1), max_pictures=8)
    with pytest.raises(UserError, match="None of the 1 rows"):
        opened(write([{"image": "gone.png", "caption": "a cat"}]))


def conversation(image: str | None, question: str, answer: str, **others: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": f"<image>\n{question}" if image else question}, {"from": "gpt", "value": answer}]
    return {"conversations": said, **({"image": image} if image else {}), **others}


def test_llava_rows(write: Write) -> None:
    two = conversation("4.png", "Describe the image.", "A red house.")
    two["conversations"] = two["conversations"] + [{"from": "human", "value": "So?"}, {"from": "gpt", "value": "Yes."}]
    rows = [
        conversation("0.png", "Render a clear and concise summary of the photo.", "a dog in the park. It runs."),
        conversation("1.png", "Is there a cat?", "Yes."),
        conversation("2.png", "Is there a cat?", "Yes.", caption="a cat on a mat"),
        conversation(None, "Describe the image of the sea.", "It is blue and wide."),
        two,
        conversation("0.png", "Is there a dog?", "Yes."),
        conversation("3.png", "Is there a cat?", "Yes.", objects="cat, dog"),
    ]
    found = read_scenes(write(rows))
    assert [scene.caption for scene in found.scenes] == ["a dog in the park", "a cat on a mat"]
    assert not found.rejections, "such rows are good to train on"
    reason = told("data.probes.captions")
    assert "3 rows with neither caption nor objects" in reason
    assert "1 rows without exactly one picture" in reason
    assert "1 conversations whose keys say something else (wrong type)" in reason


@pytest.mark.parametrize(
    ("question", "answer", "caption"),
    [
        ("Provide a brief description of the given image.", "olive oil is a healthy fat", "olive oil is a healthy fat"),
        ("What is in the picture?", "A cat.", "A cat"),
        ("What is in the picture?", "Cat.", None),
        ("Is the cat in the picture asleep?", "It is fast asleep.", None),
        ("Explain why the sky is blue.", "Light is scattered.", None),
        ("Write a terse summary of the picture.", "Is it a man? He waves.", "Is it a man?"),
        ("What are the men in the photo doing?", "They play.", None),
    ],
)
def test_which_answers_are_captions(question: str, answer: str, caption: str | None) -> None:
    made = description(Sample("1", (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))))
    assert made == ((caption,) if caption else ())


def test_one_scene_per_picture_and_unique_ids(write: Write) -> None:
    rows = [
        {"id": "a", "image": "0.png", "objects": [CAT]},
        {"id": "a", "image": "1.png", "caption": "a dog"},
        {"id": "b", "image": "0.png", "caption": "a cat", "objects": [CAT]},
    ]
    scenes = read_scenes(write(rows)).scenes
    assert [(scene.image.name, scene.caption) for scene in scenes] == [("0.png", "a cat"), ("1.png", "a dog")]
    assert len({scene.id for scene in scenes}) == 2
    assert "1 further rows about the same picture" in told("data.probes.captions")


INSTANCES = {
    "info": {"year": 2026},
    "images": [{"id": 5, "file_name": "1.png", "width": 40, "height": 30}, {"id": 3, "file_name": "0.png"}],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 18, "bbox": [1, 2, 10, 20], "iscrowd": 0},
        {"id": 2, "image_id": 3, "category_id": 1, "bbox": [0, 0, 40, 30], "iscrowd": 1},
    ],
    "categories": [
        {"id": 18, "name": "dog", "supercategory": "animal"},
        {"id": 1, "name": "person", "supercategory": "person"},
    ],
}
CAPTIONS = {
    "info": {"year": 2026},
    "images": INSTANCES["images"],
    "annotations": [
        {"id": 9, "image_id": 3, "caption": "Something in a park. "},
        {"id": 8, "image_id": 3, "caption": "A dog in a park."},
        {"id": 7, "image_id": 5, "caption": "A quiet street."},
    ],
}


def _coco(write: Write, named: str) -> Scenes:
    write(INSTANCES, "instances_val.json")
    write(CAPTIONS, "captions_val.json")
    return read_scenes(write({"instances": INSTANCES, "captions": CAPTIONS}[named], f"{named}_val.json"))


@pytest.mark.parametrize("named", ["instances", "captions"])
def test_coco_files_lead_to_each_other(write: Write, named: str) -> None:
    first, second = _coco(write, named).scenes
    assert (first.id, first.image.name, first.caption) == ("3", "0.png", "A dog in a park")
    assert first.objects is not None
    assert [(each.name, each.kinds["category"], each.box) for each in first.objects] == [
        ("dog", "animal", (1, 2, 11, 22)),
        ("person", "person", None),
    ]
    assert (second.caption, second.objects) == ("A quiet street", ())


def test_one_coco_file_alone(write: Write) -> None:
    (scene, _) = read_scenes(write(CAPTIONS, "captions_a.json")).scenes
    assert (scene.caption, scene.objects) == ("Something in a park", None)
    (scene, _) = read_scenes(write(INSTANCES, "instances_b.json")).scenes
    assert (scene.captions, len(scene.objects or ())) == ((), 2)
    (scene, _) = read_scenes(write(CAPTIONS, "mine.json")).scenes
    assert scene.captions


@pytest.mark.parametrize(
    "spoil",
    [
        {"images": [{"id": 1}]},
        {"annotations": [{"image_id": 3, "category_id": 99}]},
        {"annotations": [{"image_id": 3, "segments_info": []}]},
        {"annotations": 7},
    ],
)
def test_other_coco_files_are_refused(write: Write, spoil: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not one of COCO's annotation files"):
        read_scenes(write({**INSTANCES, **spoil}, "instances_val.json"))


def test_hf_rows_are_not_taken_for_coco(write: Write) -> None:
    said = [{"role": "user", "content": "What is in the picture?"}, {"role": "assistant", "content": "A red cat."}]
    found = read_scenes(write([{"images": ["0.png"], "messages": said}], "rows.jsonl"))
    assert [scene.caption for scene in found.scenes] == ["A red cat"]


def test_boxes_of_a_turned_picture_are_not_used(write: Write, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    rows = [{"image": "turned.jpg", "caption": "a cat", "objects": [CAT]}, {"image": "0.png", "caption": "a dog"}]
    ledger = Ledger()
    open_probe_set(write(rows), None, ledger, max_pictures=4)
    assert [(each.reason, each.kind) for each in ledger] == [("boxes not used: EXIF turns the picture", "cut")]


def test_broken_pictures_fall_out_and_others_take_their_place(write: Write, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    rows = [{"image": f"{i}.png", "caption": f"a thing {i}"} for i in range(10)]
    ledger = Ledger(0.5)
    probe_set = open_probe_set(write(rows), None, ledger, max_pictures=9)
    assert {path.stem for path in probe_set.images} == set("123456789")
    assert [each.reason.partition(":")[0] for each in ledger] == ["not an image"]


def test_the_richest_pictures_come_first(write: Write) -> None:
    rows = [{"image": f"{i}.png", **({"caption": f"thing {i}"} if i % 2 else {"objects": [CAT]})} for i in range(10)]
    probe_set = opened(write(rows), max_pictures=5)
    assert {int(path.stem) for path in probe_set.images} == {1, 3, 5, 7, 9}


@pytest.mark.parametrize("most", [2, 3, 5, 7])
def test_groups_are_chosen_as_a_whole(write: Write, most: int) -> None:
    rows = [{"image": f"{i}.png", "caption": f"thing {i}", "group": i // 2} for i in range(8)]
    chosen = {int(path.stem) for path in opened(write(rows), max_pictures=most).images}
    assert len(chosen) == most - most % 2
    assert {i // 2 for i in chosen if i % 2} == {i // 2 for i in chosen if not i % 2}


def test_a_saved_set_is_taken_as_it_is(write: Write, tmp_path: Path) -> None:
    rows = [{"image": f"{i}.png", "caption": f"a thing {i}"} for i in range(8)]
    drawn = opened(write(rows))
    drawn.save(tmp_path / "set.json")
    assert opened(tmp_path / "set.json").hash == drawn.hash
    assert len(opened(tmp_path / "set.json", max_pictures=4).images) == 4


def test_what_cannot_be_probed_is_told(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing can be probed with"):
        opened(write([conversation("0.png", "Is there a cat?", "Yes.")]))
    with pytest.raises(UserError, match="No file"):
        opened(tmp_path / "gone.json")
    rows = [{"image": "0.png", "caption": "a cat"}, {"image": "1.png", "caption": "a dog"}]
    for prompt in ("Is it right?", "{caption} {caption}", "<image> {caption} <image>"):
        with pytest.raises(UserError, match=r"data\.probe_prompt cannot be used"):
            opened(write(rows), prompt=prompt)
    assert any(
        row.text == "Look: <image> a cat, no?"
        for row in opened(write(rows), prompt="Look: <image> {caption}, no?").rows
    )


def test_a_caption_that_the_question_says_too_is_not_asked(write: Write) -> None:
    rows = [{"image": "0.png", "caption": "image"}, {"image": "1.png", "caption": "a dog"}]
    ledger = Ledger()
    probe_set = open_probe_set(write(rows), None, ledger, max_pictures=4)
    assert all(row.text.count(row.span) == 1 for row in probe_set.rows)
    assert {each.kind for each in ledger} == {"cut"}
    assert {each.reason.partition(":")[0] for each in ledger} == {"caption says what the question says"}


def test_file_for_probes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert file_for_probes({"val": "v.json", "test": "t.json"}) == "v.json"
    assert file_for_probes({"val": None, "test": "t.json"}) == "t.json"
    with pytest.raises(UserError, match="nothing to look inside"):
        file_for_probes({"val": None, "test": None})
