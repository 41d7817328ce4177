"""Pictures with cells over them: each where its patch is, the stronger the more it counts; lost files are told."""

import re
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from lightning_mm.report.figures import theme
from lightning_mm.report.sections.image_overlays import READ, SIDE, strips
from tests.helpers.causal_files import overlay_of

HOSTILE = "<script>alert('x')</script>\"'&\u202e\x00"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (600, 400), "white").save(tmp_path / "pictures" / "a.png")
    Image.new("RGB", (10, 10)).save(tmp_path / "secret.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"\x89PNG no more")
    return tmp_path


def cells(svg):
    found = {}
    for rect in ET.fromstring(svg).iter("rect"):
        words = rect.find("title").text
        assert words not in found
        found[words] = [float(rect.get(key)) for key in ("x", "y", "width", "height", "fill-opacity")]
    return found


def test_cells_lie_over_their_patches_and_the_strongest_covers_most(root):
    (strip,), told = strips(root, [overlay_of()])
    assert told == []
    assert [words for words, _ in strip.shown] == ["as it is", "layer 2"]
    assert strip.what == "contribution to the constraint"
    found = cells(strip.shown[1][1])
    assert len(found) == 24
    best = found["row 2, column 5: 0.8"]
    assert best[:4] == pytest.approx(
        [4 * SIDE / 6, SIDE / 1.5 / 4, SIDE / 6, SIDE / 1.5 / 4], abs=0.2
    )  # pixels are whole
    assert best[4] == max(cell[4] for cell in found.values()) < 1


def test_layers_of_one_picture_stand_side_by_side_and_hold_it_once(root):
    items = [overlay_of(layer=layer) for layer in (9, 1, 30, *range(40, 60))]
    (strip,), _ = strips(root, items)
    shown = [words for words, _ in strip.shown]
    assert shown[:3] == ["as it is", "layer 1", "layer 40"]
    assert len(shown) == 9
    assert "15 layers in between are left out" in strip.problem
    both = "".join(svg for _, svg in strip.shown)
    assert both.count("data:image/jpeg") == 1
    assert set(re.findall(r'href="(#[^"]+)"', both)) == {"#picture-0"}
    assert both.count('id="picture-0"') == 1


@pytest.mark.parametrize("image", ["broken.png", "none.png", "../secret.png", "pictures/../../secret.png", "", "\x00"])
def test_a_picture_that_cannot_be_shown_is_told_and_its_weights_are_drawn(root, image):
    (strip,), _ = strips(root, [overlay_of(image=image)])
    assert "cannot be shown" in strip.problem
    assert "data:" not in "".join(svg for _, svg in strip.shown)
    assert len(cells(strip.shown[0][1])) == 24


def test_words_stand_in_their_cells_and_the_most_frequent_are_said(root):
    words = [[" cat"] * 6, [" dog"] * 6, [HOSTILE] * 6, ["x" * 300] * 6]
    (strip,), _ = strips(root, [overlay_of(words=words, what="logit lens, layer 2")])
    drawing = ET.fromstring(strip.shown[1][1])
    texts = [text.text or "" for text in drawing.iter("text")]
    assert texts[:7] == ["cat"] * 6 + ["dog"]
    assert max(map(len, texts)) < READ / 6 / 4
    assert "“ dog”: 80\u00a0%" in [title.text for title in drawing.iter("title")]
    assert strip.frequent.startswith("Most frequent in layer 2: “cat” 6 times, “dog” 6 times")
    assert not [e for e in drawing.iter() if e.tag == "script"]


def test_words_too_small_to_read_are_left_to_the_tips(root):
    (strip,), _ = strips(root, [overlay_of(grid=(24, 24), words=[["a"] * 24] * 24)])
    drawing = ET.fromstring(strip.shown[1][1])
    assert list(drawing.iter("text")) == []
    assert len(list(drawing.iter("rect"))) == 576


def test_fine_grids_and_signs(root):
    weights = [[(-1) ** i * 0.5 if j else None for j in range(100)] for i in range(100)]
    (strip,), _ = strips(root, [overlay_of(grid=(100, 100), weights=weights)])
    drawing = strip.shown[1][1]
    assert len(drawing) < 400_000
    assert {path.get("fill") for path in ET.fromstring(drawing).iter("path")} == {theme.SIGNED[0], theme.SIGNED[-1]}


@pytest.mark.parametrize(
    "changed",
    [
        {"grid": [0, 4]},
        {"grid": [400, 400]},
        {"grid": [4]},
        {"weights": [[1.0]]},
        {"weights": None},
        {"words": [["a"]]},
    ],
)
def test_what_is_no_overlay_is_counted_and_the_others_are_drawn(root, changed):
    found, told = strips(root, [overlay_of(), overlay_of() | changed, None])
    assert len(found) == 1
    assert [words[:36] for words in told] == [
        "1 of 3 pictures cannot be read (Valu",
        "1 of 3 pictures cannot be read (Type",
    ]


def test_many_pictures_are_counted_and_undefined_weights_are_no_fault(root):
    found, told = strips(root, [overlay_of(id=f"q{i}", weights=[[None] * 6] * 4) for i in range(40)])
    assert len(found) == 12
    assert told == ["28 further pictures stand in pictures.json."]
    assert "undefined everywhere" in found[0].shown[1][1]
    with pytest.raises(ValueError, match="no list"):
        strips(root, {})
