"""Files of every form that probes are drawn from: what they say is read, what is wrong in them is in the ledger."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data.images import load
from lightning_mm.data.probe_sets.build import open_probe_set, split_for_probes
from lightning_mm.data.probe_sets.build.coco import SceneFile, read_scenes
from lightning_mm.data.probe_sets.build.sampling import select_images
from lightning_mm.data.probe_sets.build.scenes import caption_from_answer
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.sample import Sample, Turn

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
    return [decision for decision in decision_log() if decision.name == name][-1].reason


def opened(path: Path, **options: Any) -> ProbeSet:
    return open_probe_set(path, None, RejectedSamples(0.5), **{"max_pictures": 64, **options})


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
    "normalised box": [
        {"image": "1.png", "objects": [{**CAT, "box": box}]} for box in ([0.6, 0.6, 0.9, 0.9], [0, 0, 1, 1])
    ],
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
    ledger = RejectedSamples(0.2)
    open_probe_set(path, None, ledger, max_pictures=8)
    assert (ledger.num_dropped, ledger.num_rows) == (1, {"data.probes": 6})
    with pytest.raises(UserError, match=r"1 of 6 rows of data\.probes cannot be used"):
        open_probe_set(path, None, RejectedSamples(0.1), max_pictures=8)
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
        ("Is there a caption in the image?", "No there is none.", None),
        ("Look at the photo. Does it depict a dog?", "It does depict one.", None),
        ("Describe the image.", "Yes, two dogs run.", None),
        ("Describe the image.", "No parking sign in a street.", "No parking sign in a street"),
        ("Could you describe the image?", "Two dogs on a beach.", "Two dogs on a beach"),
        ("Is it a photo? Describe the image.", "Two dogs on a beach.", "Two dogs on a beach"),
    ],
)
def test_which_answers_are_captions(question: str, answer: str, caption: str | None) -> None:
    made = caption_from_answer(Sample("1", (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))))
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


def _coco(write: Write, named: str) -> SceneFile:
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


def coco(annotations: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    made = [{"image_id": 3, **each} for each in annotations]
    return {"images": INSTANCES["images"], "annotations": made, "categories": INSTANCES["categories"], **others}


def test_what_the_instances_do_not_list_is_not_known(write: Write) -> None:
    """COCO's parts differ: a picture with captions that the instances never saw is not empty."""
    write({**INSTANCES, "images": INSTANCES["images"][1:]}, "instances_val.json")
    first, second = read_scenes(write(CAPTIONS, "captions_val.json")).scenes
    assert len(first.objects or ()) == 2
    assert (second.caption, second.objects) == ("A quiet street", None)


def test_a_file_of_captions_and_things(write: Write) -> None:
    told_apart = [
        {"caption": "A dog."},
        {"category_id": 18, "bbox": [1, 2, 10, 20]},
        {"caption": " "},
        {"caption": "."},
    ]
    (first, second) = read_scenes(write(coco(told_apart), "mixed.json")).scenes
    assert (first.captions, [each.box for each in first.objects or ()]) == (("A dog",), [(1, 2, 11, 22)])
    assert (second.captions, second.objects) == ((), ())


def test_things_that_captions_refer_to_keep_their_boxes(write: Write) -> None:
    """As in RefCOCO: several expressions for one thing, each with its box."""
    box = {"category_id": 18, "bbox": [1, 2, 10, 20]}
    (first, _) = read_scenes(
        write(coco([{**box, "caption": "the dog"}, {**box, "caption": "a brown one"}, {"category_id": 1}]), "refs.json")
    ).scenes
    assert first.captions == ("the dog", "a brown one")
    assert [(each.name, each.box) for each in first.objects or ()] == [("dog", (1, 2, 11, 22)), ("person", None)]


@pytest.mark.parametrize("bbox", [[None] * 4, [1, 2, 10, 0], [1, 2, -1, 5], [0, 0, 0.5, 0.5], "x", None, [1, 2]])
def test_a_box_of_no_area_is_no_box(write: Write, bbox: Any) -> None:
    path = write(coco([{"category_id": 18, "bbox": bbox}]), "instances_val.json")
    found = read_scenes(path)
    assert [each.box for each in found.scenes[0].objects or ()] == [None]
    assert not found.rejections


def test_a_coco_file_is_parsed_once(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path, parsed, parse = write(CAPTIONS, "mine.json"), [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(len(text)) or parse(text))
    read_scenes(path)
    assert len(parsed) == 1


@pytest.mark.parametrize(
    "more",
    [{"info": {"source": "web"}}, {"annotations": [{"by": "me"}]}, {"info": {"text": "x" * 9000}}],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_rows_with_keys_of_coco_are_rows(write: Write, more: dict[str, Any], is_first: bool) -> None:
    row = {"image": "0.png", "caption": "a cat"}
    found = read_scenes(write([{**more, **row} if is_first else {**row, **more}], "rows.jsonl"))
    assert [scene.caption for scene in found.scenes] == ["a cat"]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_coco_file_is_known_however_it_is_written(tmp_path: Path, write: Write, indent: int | None) -> None:
    write([])
    long = {**CAPTIONS, "info": {"description": "x" * 5000}}
    (tmp_path / "c.json").write_text(json.dumps(long, indent=indent))
    assert len(read_scenes(tmp_path / "c.json").scenes) == 2


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
    ledger = RejectedSamples()
    open_probe_set(write(rows), None, ledger, max_pictures=4)
    assert [(each.reason, each.kind) for each in ledger] == [("boxes not used: EXIF turns the picture", "cut")]


def things(i: int, box: list[float]) -> dict[str, Any]:
    return {"image": f"{i}.png", "objects": [{"name": ("cat", "dog")[i % 2], "box": box}]}


def test_boxes_outside_their_picture_are_told_and_not_counted(write: Write) -> None:
    rows = [things(i, [1, 2, 30, 25]) for i in range(10)]
    rows[3]["objects"].append({"name": "owl", "box": [41, 2, 60, 12]})
    scenes = read_scenes(write(rows)).scenes
    chosen, faults = select_images(scenes, 64, load, 0)
    assert [len(each.scene.objects or ()) for each in chosen] == [1] * 10
    (fault,) = faults
    assert fault.reason == "box outside the picture: 'owl' at [41.0, 2.0, 60.0, 12.0], the picture is 40 x 30"
    assert (fault.origin, fault.kind) == (scenes[3].origin, "cut")


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([[1, 2, 11, 12]], "looks like x, y, w, h"),
        ([[1, 2, 11, 12], [25, 2, 38, 12]], ""),
        (
            [[1, 2, 11, 12], [300, 20, 380, 120], [30, 5, 700, 28]],
            "of another size of the pictures, or a scale to 1000",
        ),
        ([[0, 0, 40, 30]], ""),
        ([[25, 20, 40.5, 30.5]], ""),
    ],
)
def test_boxes_that_look_like_another_format_are_said(write: Write, boxes: list[list[float]], said: str) -> None:
    decision_log().clear()
    rows = [things(i, boxes[i % len(boxes)]) for i in range(10)]
    select_images(read_scenes(write(rows)).scenes, 64, load, 0)
    reasons = [each.reason for each in decision_log() if each.name == "data.probes.boxes"]
    assert len(reasons) == bool(said)
    assert all(said in reason for reason in reasons)


def test_broken_pictures_fall_out_and_others_take_their_place(write: Write, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    rows = [{"image": f"{i}.png", "caption": f"a thing {i}"} for i in range(10)]
    ledger = RejectedSamples(0.5)
    probe_set = open_probe_set(write(rows), None, ledger, max_pictures=9)
    assert {path.stem for path in probe_set.images} == set("123456789")
    assert [each.reason.partition(":")[0] for each in ledger] == ["not an image"]


def test_a_picture_that_breaks_off_falls_out_with_its_group_before_captions_are_traded(
    write: Write, tmp_path: Path
) -> None:
    noise = Image.effect_noise((200, 200), 80)
    noise.save(tmp_path / "whole.jpg")
    (tmp_path / "1.png").write_bytes((tmp_path / "whole.jpg").read_bytes()[:4000])
    rows = [{"image": f"{i}.png", "caption": f"a thing {i}", "group": i // 2} for i in range(4)]
    for i, row in enumerate(rows):
        row["false_captions"] = [f"a thing {i + 1 - 2 * (i % 2)}"]
    rows += [{"image": f"{i}.png", "caption": f"a thing {i}", "group": "video"} for i in range(4, 8)]
    (tmp_path / "5.png").write_bytes(b"")
    ledger = RejectedSamples(0.5)
    probe_set = open_probe_set(write(rows), None, ledger, max_pictures=9)
    assert {path.stem for path in probe_set.images} == set("23467")
    assert sorted(each.reason.partition(":")[0] for each in ledger) == [
        "group not whole",
        "image does not decode",
        "not an image",
    ]


def test_a_group_with_a_bad_row_is_not_whole(write: Write) -> None:
    rows = [
        {"image": f"{i}.png", "caption": f"a {name}", "false_captions": [f"an {name}"], "group": i // 2}
        for i, name in enumerate(("cat", "dog", "bus", "car"))
    ]
    bad = {"image": "gone.png", "group": ""}
    rows.append({"image": "4.png", "caption": "an owl", "false_captions": ["an elk"]})
    found = read_scenes(write([*rows[:3], {**rows[3], "image": "gone.png"}, rows[4], bad]))
    assert [scene.caption for scene in found.scenes] == ["a cat", "a dog", "an owl"]
    assert [each.reason.partition(":")[0] for each in found.rejections] == ["missing image"] * 2 + ["group not whole"]


def test_a_picture_of_too_many_pixels_is_in_the_ledger(write: Write, tmp_path: Path) -> None:
    """400 megapixels, says the header: PIL raises on it before anybody can look at its size."""
    rows = [{**things(i, [1, 2, 30, 25]), "caption": f"a thing {i}"} for i in range(10)]
    path = write(rows)
    (tmp_path / "0.png").write_bytes(b"P6 20000 20000 255\n")
    ledger = RejectedSamples(0.5)
    open_probe_set(path, None, ledger, max_pictures=64)
    assert [each.reason.partition(":")[0] for each in ledger] == ["image too large"]


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


def test_of_a_group_that_is_too_large_some_are_drawn(write: Write) -> None:
    decision_log().clear()
    rows = [{"image": f"{i}.png", "caption": f"thing {i}", "group": i % 5 > 0} for i in range(10)]
    chosen = {int(path.stem) for path in opened(write(rows), max_pictures=6).images}
    assert {0, 5} < chosen
    assert len(chosen) == 2 + 3, "half of six for each of two groups, of which one has but two"
    assert told("data.probes.groups") == "1 groups, the largest of 8 pictures"


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
    ledger = RejectedSamples()
    probe_set = open_probe_set(write(rows), None, ledger, max_pictures=4)
    assert all(row.text.count(row.span) == 1 for row in probe_set.rows)
    assert {each.kind for each in ledger} == {"cut"}
    assert {each.reason.partition(":")[0] for each in ledger} == {
        "caption says what the question says",
        "trade not whole",
    }
    assert not [row for row in probe_set.rows if row.role == "entailment"], "half of a trade would be a cue"


def test_split_for_probes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert split_for_probes({"val": "v.json", "test": "t.json"}) == "val"
    assert split_for_probes({"val": None, "test": "t.json"}) == "test"
    with pytest.raises(UserError, match="nothing to look inside"):
        split_for_probes({"val": None, "test": None})
