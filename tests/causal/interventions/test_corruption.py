"""Corrupt inputs: as long as the clean ones, different where they should be and nowhere else, and never by luck.

Data flow: tiny models of many families with questions about pictures -> each corruption -> what the decoder is given.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_mm.causal.interventions.activation_cache import ActivationCache, cache_activations
from lightning_mm.causal.interventions.corruption import (
    CORRUPTIONS,
    CorruptedQuestion,
    CorruptionKind,
    corrupt_question,
    first_token,
)
from lightning_mm.causal.questions.image_regions import grey_out_boxes
from lightning_mm.causal.questions.question import EncodedQuestion, Question, last_logits
from lightning_mm.core.errors import UserError
from lightning_mm.data.probe_sets.files import ObjectBox
from lightning_mm.data.sample import Rejection
from tests.helpers.causal_models import FAMILIES, Subject, noise, subject

TEXT = "Is the cat red? What colour is the cat?"
SPANS = ((7, 10), (35, 38))


@pytest.fixture
def llava(family: Callable[[str], Path], tmp_path: Path) -> Subject:
    return subject(family, "llava", tmp_path)


def ask(one: Subject, text: str = TEXT, words: str = "cat", seed: int = 0, **fields: Any) -> EncodedQuestion:
    """A question in which every place of the words is the constraint."""
    starts = [at for at in range(len(text)) if text.startswith(words, at)]
    question = Question(f"q{seed}", text, (noise(one.folder / f"{seed}.png", seed),), ())
    spans = tuple((at, at + len(words)) for at in starts)
    encoded = one.encoder.encode(replace(question, spans=spans, **fields))
    assert isinstance(encoded, EncodedQuestion), encoded
    return encoded


def corrupt(
    one: Subject, encoded: EncodedQuestion, kind: CorruptionKind, *others: EncodedQuestion, seed: int = 0
) -> CorruptedQuestion:
    made = corrupt_question(encoded, kind, (encoded, *others), one.processing, one.mm, seed)
    assert isinstance(made, CorruptedQuestion), made
    return made


def refusal(one: Subject, encoded: EncodedQuestion, kind: CorruptionKind, *others: EncodedQuestion) -> str:
    made = corrupt_question(encoded, kind, (encoded, *others), one.processing, one.mm)
    assert isinstance(made, Rejection)
    assert made.origin == encoded.question.id
    return made.reason


def run(one: Subject, corrupt: CorruptedQuestion) -> ActivationCache:
    with corrupt.applied(one.mm):
        return cache_activations(one.mm, corrupt.inputs)


def changed(clean: ActivationCache, other: ActivationCache) -> list[int]:
    """Tokens at which other things enter the decoder."""
    return (clean.block_inputs[0] != other.block_inputs[0]).any(-1)[0].nonzero().flatten().tolist()


def decoded(one: Subject, ids: Tensor) -> str:
    text: str = one.processing.processor.tokenizer.decode(ids)
    return text


@pytest.mark.parametrize("name", FAMILIES)
def test_every_corruption_changes_what_it_should_and_nothing_else(
    name: str, family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, name, tmp_path)
    box = ObjectBox("thing", (8, 8, 40, 40))
    encoded = ask(one, boxes=(box,), answer="red")
    other = ask(one, "Where is the table now?", "table", seed=1, answer="blue")
    assert [len(span) for span in (*encoded.spans, *other.spans)] == [1, 1, 1]
    clean = cache_activations(one.mm, encoded.inputs)
    for kind in CORRUPTIONS:
        made = corrupt(one, encoded, kind, other)
        assert {k: v.shape[:2] for k, v in made.inputs.items() if k == "input_ids"} == {
            "input_ids": (1, encoded.length)
        }
        assert made.inputs.keys() == encoded.inputs.keys()
        wanted = (encoded.image if kind in ("image", "grey") else encoded.constraint).tolist()
        assert made.positions.tolist() == wanted
        again = run(one, made)
        entered = changed(clean, again)
        if kind not in ("image", "grey"):
            assert entered == wanted
        elif name != "mllama":  # whose cross-attention sees pictures from outside the row of tokens
            assert set(entered) <= set(wanted), "some are the same in every picture: ends of its lines"
            assert len(entered) >= 2 / 3 * len(wanted)
        assert not torch.equal(again.logits, clean.logits)
        assert torch.equal(run(one, made).logits, again.logits)
    untouched = cache_activations(one.mm, encoded.inputs)
    assert torch.equal(untouched.logits, clean.logits), "nothing is left behind"


def test_token_writes_the_word_as_it_stands_in_a_sentence(llava: Subject) -> None:
    encoded = ask(llava, "What colour is the unbelievable flag?", "unbelievable")
    made = corrupt(llava, encoded, "token")
    assert len(made.positions) > 2
    (ids,) = made.inputs["input_ids"]
    vocabulary = llava.processing.processor.tokenizer.get_vocab()
    assert set(ids[made.positions].tolist()) == {vocabulary["Pa"]}, "a blank that is a token of its own is no word"
    assert first_token(llava.processing, "table") == vocabulary["Ġtable"], "but one that is joined to the word is"
    assert first_token(llava.processing, "Émile") == vocabulary["Ã"]
    with pytest.raises(UserError, match="has no token"):
        first_token(llava.processing, "")


def test_what_changes_nothing_is_refused(llava: Subject) -> None:
    encoded = ask(llava, "Is the Pa red?", "Pa")
    first = first_token(llava.processing, "Paris")
    assert encoded.inputs["input_ids"][0, encoded.constraint].tolist() == [first]
    assert refusal(llava, encoded, "token").startswith("corruption changes nothing")
    twin = ask(llava, "Where is the Pa?", "Pa", seed=1)
    assert refusal(llava, encoded, "symmetric", twin).startswith("no lender")
    copy = replace(twin.question, images=(llava.folder / "copy.png",))
    copy.images[0].write_bytes(encoded.question.images[0].read_bytes())
    same = llava.encoder.encode(copy)
    assert isinstance(same, EncodedQuestion)
    assert refusal(llava, encoded, "image", same).startswith("no lender")
    grey = Image.new("RGB", (48, 40), (127, 127, 127))
    grey.save(llava.folder / "grey.png")
    box = ObjectBox("x", (1, 1, 30, 30))
    blank = llava.encoder.encode(replace(twin.question, images=(llava.folder / "grey.png",), boxes=(box,)))
    assert isinstance(blank, EncodedQuestion)
    assert refusal(llava, blank, "grey").startswith("corruption changes nothing")
    with torch.no_grad():
        llava.model.get_submodule(llava.layout.embedding).weight.fill_(1.0)
    assert refusal(llava, encoded, "gaussian").startswith("corruption changes nothing")


def test_what_is_missing_is_told(llava: Subject) -> None:
    encoded = ask(llava, words="nothing of it")
    for kind in ("token", "symmetric", "gaussian"):
        assert refusal(llava, encoded, kind).startswith("no constraint in the text")
    assert refusal(llava, encoded, "grey").startswith("no boxes")
    assert refusal(llava, ask(llava, boxes=(ObjectBox("x", (60, 1, 70, 9)),)), "grey").startswith("box outside")
    alone = llava.encoder.encode(Question("t", TEXT, (), SPANS, boxes=(ObjectBox("x", (0, 0, 9, 9)),)))
    assert isinstance(alone, EncodedQuestion)
    assert refusal(llava, alone, "image", encoded).startswith("no picture")
    assert refusal(llava, alone, "grey").startswith("boxes of one picture")
    with pytest.raises(UserError, match="There is no corruption 'blur'"):
        corrupt(llava, encoded, "blur")  # type: ignore[arg-type]


def test_symmetric_takes_the_words_of_one_lender_of_the_same_length(llava: Subject) -> None:
    encoded = ask(llava, answer="red", kind="a")
    lenders = [
        ask(llava, "Is there a bird?", "bird", seed=1, answer="red", kind="a"),
        ask(llava, "Is there this?", "is", seed=2, answer="blue", kind="b"),
        ask(llava, "Is there a table?", "table", seed=3, answer="blue", kind="a"),
        ask(llava, "Is it an unbelievable cat?", "unbelievable cat", seed=4, answer="blue", kind="a"),
    ]
    long = next(each for each in lenders[::-1] if len(each.spans[0]) > 1)
    assert len(long.constraint) > 1
    for seed in range(5):
        made = corrupt(llava, encoded, "symmetric", *lenders, seed=seed)
        assert made.donor == "q3", "another answer and the same kind go first"
        assert decoded(llava, made.inputs["input_ids"][0, encoded.spans[1]]) == " table"
    assert corrupt(llava, encoded, "symmetric", *lenders[:2]).donor == "q2"
    assert corrupt(llava, encoded, "symmetric", lenders[0]).donor == "q1"
    assert refusal(llava, encoded, "symmetric", long).startswith("no lender: no other question has another constraint")


def test_the_choice_hangs_on_the_seed_and_not_on_the_order(llava: Subject) -> None:
    encoded = ask(llava)
    others = [ask(llava, seed=seed) for seed in range(1, 9)]
    donors = [corrupt(llava, encoded, "image", *others, seed=seed).donor for seed in range(12)]
    assert donors == [corrupt(llava, encoded, "image", *others[::-1], seed=seed).donor for seed in range(12)]
    assert len(set(donors)) > 2
    one, two = (corrupt(llava, encoded, "gaussian", seed=seed).noise for seed in (0, 1))
    assert one is not None
    assert two is not None
    assert not torch.equal(one, two)


def test_image_puts_the_whole_picture_of_the_lender(llava: Subject) -> None:
    encoded, other = ask(llava), ask(llava, seed=1)
    made = corrupt(llava, encoded, "image", other)
    assert torch.equal(made.inputs["pixel_values"], other.inputs["pixel_values"])
    assert torch.equal(made.inputs["input_ids"], encoded.inputs["input_ids"])
    assert made.donor == "q1"
    with torch.no_grad():
        assert torch.equal(run(llava, made).logits, last_logits(llava.mm, other.inputs))


def test_pictures_of_other_shapes_are_put_in_whole_or_not_at_all(family: Callable[[str], Path], tmp_path: Path) -> None:
    """What the processor says of a picture's size goes with its pixels; another number of tokens does not fit."""
    one = subject(family, "qwen2_5_vl", tmp_path)
    encoded = ask(one)
    for name, size in (("tall.png", (48, 56)), ("small.png", (28, 28))):
        noise(tmp_path / name, 7)
        with Image.open(tmp_path / name) as picture:
            picture.resize(size).save(tmp_path / name)
    tall, small = (
        one.encoder.encode(replace(encoded.question, id=n, images=(tmp_path / n,))) for n in ("tall.png", "small.png")
    )
    assert isinstance(tall, EncodedQuestion)
    assert isinstance(small, EncodedQuestion)
    assert len(tall.image) == len(encoded.image) != len(small.image)
    made = corrupt(one, encoded, "image", tall, small)
    assert made.donor == "tall.png"
    assert torch.equal(made.inputs["image_grid_thw"], tall.inputs["image_grid_thw"])
    assert torch.equal(run(one, made).logits, last_logits(one.mm, tall.inputs))
    assert refusal(one, encoded, "image", small).startswith("no lender")


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_noise_is_three_standard_deviations_of_the_embeddings(
    name: str, family: Callable[[str], Path], tmp_path: Path
) -> None:
    one = subject(family, name, tmp_path)
    encoded = ask(one, "What is the most unbelievably complicated thing?", "unbelievably complicated")
    clean, made = cache_activations(one.mm, encoded.inputs), corrupt(one, encoded, "gaussian")
    at = clean.block_inputs[0][0, made.positions]
    noise_PD = run(one, made).block_inputs[0][0, made.positions] - at
    assert len(made.positions) > 5
    assert noise_PD.std() / at.std() == pytest.approx(3.0, rel=0.2)
    assert made.noise is not None
    torch.testing.assert_close(noise_PD, made.noise, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="did not take effect"), made.applied(one.mm):
        pass
    assert not one.model.get_submodule(one.layout.embedding)._forward_hooks
    with pytest.raises(ZeroDivisionError), made.applied(one.mm):
        raise ZeroDivisionError
    assert not one.model.get_submodule(one.layout.embedding)._forward_hooks


def test_grey_covers_the_boxes_and_no_more(llava: Subject) -> None:
    encoded = ask(llava, boxes=(ObjectBox("a", (2, 3, 10, 20)), ObjectBox("b", (50, 40, 99, 99))))
    picture = grey_out_boxes(encoded.question)
    assert isinstance(picture, Image.Image)
    with Image.open(encoded.question.images[0]) as before:
        for x in range(56):
            for y in range(48):
                inside = (2 <= x < 10 and 3 <= y < 20) or (x >= 50 and y >= 40)
                assert picture.getpixel((x, y)) == ((127, 127, 127) if inside else before.getpixel((x, y)))
    turned = llava.folder / "turned.jpg"
    with Image.open(encoded.question.images[0]) as before:
        exif = before.getexif()
        exif[0x112] = 6
        before.save(turned, exif=exif)
    refused = grey_out_boxes(replace(encoded.question, images=(turned,)))
    assert isinstance(refused, Rejection)
    assert refused.reason.startswith("boxes not used: EXIF")
