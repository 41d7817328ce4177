"""Probe batches: every site reads the tokens it is named after, in any company, with any family's tokenizer."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lightning_mm.analysis.hidden_states import ROLE_SITES
from lightning_mm.core.decisions import decision_log
from lightning_mm.data.collator import PromptCollator
from lightning_mm.data.probe_sets.collator import ProbeCollator
from lightning_mm.data.probe_sets.probe_set import ObjectBox, ProbeBatch, ProbeRow, Role
from lightning_mm.data.sample import Sample, Turn
from lightning_mm.models.processor import ModelProcessor

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "smolvlm", "internvl", "gemma3", "mllama")
Load = Callable[[str], ModelProcessor]
CAPTION = 'a naïve cat, and 2 dogs – "here"'

PICTURES_FIRST = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The template of LLaVA-1.5 as transformers has it, in short."""


def probe(name: str, text: str, span: str, image: Path | None, *, role: Role = "entailment", **others: Any) -> ProbeRow:
    sample = Sample(name, (Turn("user", text),), (image,) if image else (), f"t.json:{name}")
    return ProbeRow(name, "g", role, sample, span, {}, **others)


@pytest.fixture
def rows(tmp_path: Path) -> list[ProbeRow]:
    for name, size in (("wide", (60, 40)), ("tall", (40, 80))):
        Image.linear_gradient("L").resize(size).convert("RGB").save(tmp_path / f"{name}.png")
    wide, tall = tmp_path / "wide.png", tmp_path / "tall.png"
    box = ObjectBox("cat", (5.0, 5.0, 30.0, 30.0))
    return [
        probe("1", f'<image>\nThis image says "{CAPTION}". Right?', CAPTION, wide),
        probe("2", f"{CAPTION}\nWhich things?", CAPTION, None, role="text"),
        probe("3", "<image>\nWhich things?", "Which things?", tall, role="picture", boxes=(box,)),
        probe("4", f"Is <image> as {CAPTION} says?", CAPTION, tall),
        probe("5", f"Is {CAPTION} what <image> shows?", CAPTION, wide),
    ]


def read(batch: ProbeBatch, b: int, site: str) -> list[int]:
    """The tokens that a site reads."""
    weights = batch.weights[b, batch.sites[b].index(site)]
    assert weights.sum() == pytest.approx(1, abs=1e-6)
    return [int(at) for at in weights.nonzero().flatten()]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, processing: Load, rows: list[ProbeRow]) -> None:
    made = processing(name)
    batch = ProbeCollator(made)(rows)
    assert batch.rows == tuple(rows)
    tokenizer, ids = made.processor.tokenizer, batch.inputs["input_ids"]
    assert batch.weights.dtype == torch.float32
    assert batch.weights.shape == (5, max(map(len, batch.sites)), ids.shape[1])
    assert (batch.weights[batch.inputs["attention_mask"][:, None].expand_as(batch.weights) == 0] == 0).all()
    for b, row in enumerate(rows):
        assert (batch.weights[b, len(batch.sites[b]) :] == 0).all()
        length = int(batch.inputs["attention_mask"][b].sum())
        assert read(batch, b, "last") == [length - 1]
        text = read(batch, b, "text")
        said = tokenizer.decode(ids[b, text])
        assert row.span in said
        assert row.span not in tokenizer.decode(ids[b, text[1:]])
        assert row.span not in tokenizer.decode(ids[b, text[:-1]])
        pool = text
        if row.sample.images:
            pool = read(batch, b, "image")
            assert pool == torch.isin(ids[b], torch.tensor(made.image_token_ids)).nonzero().flatten().tolist()
            weights = batch.weights[b, batch.sites[b].index("image")]
            assert (weights[pool] == weights[pool[0]]).all()
        else:
            assert "image" not in batch.sites[b]
        (token,) = read(batch, b, "token")
        assert token in pool


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_inputs_are_those_of_a_question(name: str, processing: Load, rows: list[ProbeRow]) -> None:
    """One row alone has no padding, and is what generation would begin from."""
    made = processing(name)
    for row in rows:
        ours = ProbeCollator(made)([row]).inputs
        turns = (*row.sample.turns, Turn("assistant", "?"))
        theirs = PromptCollator(made)([(replace(row.sample, turns=turns), 1)]).inputs
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm"])
def test_a_row_reads_the_same_in_any_company(name: str, processing: Load, rows: list[ProbeRow]) -> None:
    """Grids are told per picture: the second picture's must not be the first's."""
    made = processing(name)
    together = ProbeCollator(made)(rows)
    for b, row in enumerate(rows):
        alone = ProbeCollator(made)([row])
        assert alone.sites[0] == together.sites[b]
        length = alone.weights.shape[2]
        kept = together.weights[b, : len(alone.sites[0]), :length]
        torch.testing.assert_close(kept, alone.weights[0], rtol=0, atol=0)


def test_the_one_token_is_drawn_by_the_id(processing: Load, rows: list[ProbeRow]) -> None:
    made = processing("llava")
    drawn = {read(ProbeCollator(made)([replace(rows[0], id=str(i))]), 0, "token")[0] for i in range(40)}
    assert len(drawn) > 8, "40 draws from 16 tokens"


def test_blank_pictures_are_grey_and_change_nothing_else(processing: Load, rows: list[ProbeRow]) -> None:
    made = processing("qwen2_5_vl")
    seen = ProbeCollator(made)(rows)
    blind = ProbeCollator(made)([replace(row, blank=True) for row in rows])
    assert torch.equal(seen.inputs["input_ids"], blind.inputs["input_ids"])
    assert torch.equal(seen.inputs["image_grid_thw"], blind.inputs["image_grid_thw"])
    assert torch.equal(seen.weights, blind.weights)
    pixels = blind.inputs["pixel_values"]
    assert torch.equal(pixels, pixels[:1].expand_as(pixels))


def test_what_cannot_be_used_falls_out_alone(processing: Load, rows: list[ProbeRow], tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    broken = probe("6", "<image>\nWhat?", "What?", tmp_path / "cut.png")
    special = probe("7", "a </s> b?", "a </s> b", None)
    long = probe("8", "word " * 200 + "What?", "What?", None)
    made = processing("llava")
    batch = ProbeCollator(made, max_length=100)([broken, rows[2], special, long, rows[0]])
    assert [row.id for row in batch.rows] == ["3", "1"]
    reasons = {each.origin: each.reason.partition(":")[0] for each in batch.rejected}
    assert reasons == {
        "t.json:6": "image does not decode",
        "t.json:7": "special token in the text",
        "t.json:8": "too long",
    }
    alone = ProbeCollator(made)(batch.rows)
    assert torch.equal(batch.weights, alone.weights)
    nothing = ProbeCollator(made)([broken])
    assert (len(nothing), nothing.inputs, nothing.sites) == (0, {}, ())


def test_a_question_that_the_template_changes_falls_out(processing: Load) -> None:
    made = processing("qwen2_5_vl")
    made.template = made.template.replace("part['text']", "part['text'] | replace('  ', ' ')")
    assert "replace" in made.template
    rows = [probe("1", "a cat\nWhat?", "a cat", None), probe("2", "a  cat\nWhat?", "a  cat", None)]
    batch = ProbeCollator(made)(rows)
    assert [row.id for row in batch.rows] == ["1"]
    assert [each.reason.partition(":")[0] for each in batch.rejected] == ["template changes the question"]


def test_missing_object_sites_are_said_once(processing: Load, rows: list[ProbeRow]) -> None:
    decision_log().clear()
    for name, told in (("llava", 0), ("llava_next", 1)):
        collator = ProbeCollator(processing(name))
        collator.log_missing_object_sites(rows)
        collator.log_missing_object_sites(rows)
        assert len([d for d in decision_log() if d.name == "data.probes.object_at_patches"]) == told
    collator.log_missing_object_sites(rows[:2])


def test_it_goes_to_workers(processing: Load, rows: list[ProbeRow]) -> None:
    collator = pickle.loads(pickle.dumps(ProbeCollator(processing("llava"))))
    batch = collator(rows)
    again = pickle.loads(pickle.dumps(batch))
    assert torch.equal(again.weights, batch.weights)
    assert [row.id for row in again.rows] == [row.id for row in rows]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_token_is_of_what_is_read_last(name: str, processing: Load, rows: list[ProbeRow]) -> None:
    """Picture and caption in one prompt: one token of the caption behind the picture, and the other way round."""
    made, image = processing(name), Path(str(rows[0].sample.images[0]))
    batch = ProbeCollator(made)(
        [
            probe("1", f"<image>\n{CAPTION}", CAPTION, image, role="text_last"),
            probe("2", f"{CAPTION}\n<image>", CAPTION, image, role="picture_last"),
        ]
    )
    if batch.rejected:
        assert name == "llava_next"  # its template writes pictures first
        assert {each.reason for each in batch.rejected} == {"order not kept: the chat template moves the picture"}
        assert "token" in batch.sites[0]
        assert "token" not in batch.sites[1]
        return
    for b, (site, other) in enumerate([("text", "image"), ("image", "text")]):
        (token,) = read(batch, b, "token")
        assert token in read(batch, b, site)
        assert token > max(read(batch, b, other))
        assert f"{batch.rows[b].role}/token" in {
            f"{role}/{name}" for role, sites in ROLE_SITES.items() for name in sites
        }


def test_a_template_that_moves_the_picture_is_told(processing: Load, rows: list[ProbeRow]) -> None:
    made, image = processing("llava"), Path(str(rows[0].sample.images[0]))
    made.template = PICTURES_FIRST
    batch = ProbeCollator(made)([probe("2", f"{CAPTION}\n<image>", CAPTION, image, role="picture_last")])
    assert [each.reason for each in batch.rejected] == ["order not kept: the chat template moves the picture"]
    assert "token" not in batch.sites[0]
