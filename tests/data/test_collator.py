"""Batches of every family: the answers and nothing else is supervised, and a row means the same in any company."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from lightning_mm.core.errors import UserError
from lightning_mm.data import videos
from lightning_mm.data.batch import Batch, TokenRegion
from lightning_mm.data.collator import Collator, PromptCollator
from lightning_mm.data.sample import Rejection, Sample, Turn
from lightning_mm.models.pixel_bounds import PixelBounds
from lightning_mm.models.processor import ModelProcessor
from tests.helpers.chat_templates import QWEN3_VL_THINKING
from tests.helpers.videos import write_video

FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "idefics3",
    "smolvlm",
    "internvl",
    "gemma3",
    "mllama",
)
Load = Callable[[str], ModelProcessor]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(folder / "wide.png")
    Image.radial_gradient("L").resize((40, 80)).convert("RGB").save(folder / "tall.png")
    (folder / "broken.png").write_bytes((folder / "wide.png").read_bytes()[:60])
    return {path.stem: path for path in folder.iterdir()}


def sample(*texts: str, images: tuple[Path, ...] = (), origin: str = "t.json:1") -> Sample:
    turns = tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))
    return Sample(origin, turns, images, origin)


@pytest.fixture
def samples(pictures: dict[str, Path]) -> list[Sample]:
    wide, tall = pictures["wide"], pictures["tall"]
    return [
        sample("<image>\nWhat?", "A red thing.", "Sure?", "Yes, I am sure.", images=(wide,), origin="t.json:1"),
        sample("Hi", "Hello you", origin="t.json:2"),
        sample("<image> or <image>?", "Both", images=(wide, tall), origin="t.json:3"),
        sample("<image> this?", "It", "<image> that?", "It too", images=(tall, wide), origin="t.json:4"),
    ]


def row_of(batch: Batch, b: int) -> Tensor:
    return batch.supervised // batch.inputs["input_ids"].shape[1] == b


def nll(model: Any, batch: Batch) -> Tensor:
    logits = model(**batch.inputs).logits.flatten(0, 1)
    return F.cross_entropy(logits[batch.supervised], batch.targets, reduction="none")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(
    name: str, family: Callable[[str], Path], processing: Load, samples: list[Sample], pictures: dict[str, Path]
) -> None:
    made = processing(name)
    batch = Collator(made)(samples)
    ids, tokenizer = batch.inputs["input_ids"], made.processor.tokenizer
    assert batch.samples == tuple(samples)
    assert not batch.rejected
    assert "labels" not in batch.inputs
    for b, one in enumerate(samples):
        said = tokenizer.decode(batch.targets[row_of(batch, b)])
        stop = tokenizer.eos_token
        assert [part.strip() for part in said.split(stop)] == [one.turns[i].text for i in one.answers] + [""]
    assert torch.equal(ids.flatten()[batch.supervised + 1], batch.targets)
    assert torch.equal(
        batch.regions.flatten()[batch.supervised + 1], torch.full_like(batch.targets, TokenRegion.ANSWER).byte()
    )
    assert (batch.regions == TokenRegion.ANSWER).sum() == batch.num_supervised
    assert torch.equal(batch.regions == TokenRegion.PAD, batch.inputs["attention_mask"] == 0)
    image_id = made.image_token_ids[0]
    assert torch.equal(batch.regions == TokenRegion.IMAGE, ids == image_id)
    assert [bool(row) for row in (ids == image_id).any(1)] == [bool(one.images) for one in samples]

    model: Any = AutoModelForImageTextToText.from_pretrained(family(name))  # in eval mode
    with torch.no_grad():
        together = nll(model, batch)
        for b, one in enumerate(samples):
            alone = nll(model, Collator(made)([one]))
            if name == "mllama" and len(one.images) < 2:
                # Tokens with no picture before them attend to all pictures there, padding too: transformers undoes
                # their mask. So company with more pictures does change such rows.
                continue
            # float32 sums over rows of another length round otherwise; mixing up rows or pictures costs 0.1 and more.
            torch.testing.assert_close(together[row_of(batch, b)], alone, rtol=0, atol=1e-5)
        prompts = PromptCollator(made)([(one, i) for one in samples for i in one.answers])
        answers = model.generate(**prompts.inputs, max_new_tokens=2, do_sample=False)
    assert answers.shape[0] == len(prompts) == 6


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "gemma3", "mllama", "smolvlm"])
def test_tokens_are_transformers_own(name: str, processing: Load, pictures: dict[str, Path]) -> None:
    made = processing(name)
    picture = Image.open(pictures["wide"]).convert("RGB")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A thing."}]},
    ]
    theirs = made.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    ours = Collator(made)([sample("<image>\nWhat?", "A thing.", images=(pictures["wide"],))]).inputs
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value)


def test_what_the_model_does_not_take_is_left_out(processing: Load, samples: list[Sample]) -> None:
    made = processing("llava")
    made.processor.tokenizer.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
    assert set(Collator(made)(samples).inputs) == {"input_ids", "attention_mask", "pixel_values"}


def test_spans_are_those_of_generation_tags(processing: Load, samples: list[Sample], pictures: dict[str, Path]) -> None:
    """transformers marks answers itself where a template has generation tags: ours must be the same tokens."""
    made = processing("qwen2_5_vl")
    made.template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content[0].text + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{% for p in m.content %}{{ '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    batch = Collator(made)([samples[0], samples[3]])
    for b, one in enumerate((samples[0], samples[3])):
        loaded = iter(Image.open(path).convert("RGB") for path in one.images)
        messages = []
        for turn in one.turns:
            text = {"type": "text", "text": turn.text.replace("<image>", "").lstrip("\n")}
            image = [{"type": "image", "image": next(loaded)}] if "<image>" in turn.text else []
            messages.append({"role": turn.role, "content": [*image, text]})
        theirs = made.processor.apply_chat_template(
            messages, chat_template=made.template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ours = (batch.regions[b] == TokenRegion.ANSWER)[batch.regions[b] != TokenRegion.PAD]
        assert ours.int().tolist() == theirs["assistant_masks"][0]


def test_a_long_row_is_cut_or_falls_out(processing: Load, samples: list[Sample]) -> None:
    made = processing("mllama")  # its cross-attention mask has a column per token too
    whole = Collator(made)(samples[:1])
    length = whole.inputs["input_ids"].shape[1]
    first = whole.regions[0].tolist().index(TokenRegion.ANSWER)
    cut = Collator(made, max_length=length - 4)(samples[:1])
    assert [(r.kind, r.reason.partition(":")[0]) for r in cut.rejected] == [("cut", "cut")]
    assert 0 < cut.num_supervised < whole.num_supervised
    for key in ("input_ids", "attention_mask", "cross_attention_mask"):
        assert torch.equal(cut.inputs[key], whole.inputs[key][:, : length - 4])
    for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        assert torch.equal(cut.inputs[key], whole.inputs[key])
    assert cut.supervised.max() < length - 5
    one_token = Collator(made, max_length=first + 1)(samples[:1])
    assert one_token.num_supervised == 1
    with pytest.raises(UserError, match="the first answer begins at token"):
        Collator(made, max_length=first)(samples[:1])


def test_image_tokens_are_never_cut(processing: Load, samples: list[Sample]) -> None:
    made = processing("llava")
    whole = Collator(made)([samples[3]])
    last_image = int((whole.regions[0] == TokenRegion.IMAGE).nonzero()[-1])
    batch = Collator(made, max_length=last_image)([samples[3], samples[1]])
    assert batch.samples == (samples[1],)
    assert batch.rejected[0].reason.startswith("too long: image tokens")
    assert "pixel_values" not in batch.inputs


def test_one_bad_picture_costs_one_row(processing: Load, samples: list[Sample], pictures: dict[str, Path]) -> None:
    bad = sample("<image> What?", "A.", images=(pictures["broken"],), origin="t.json:9")
    batch = Collator(processing("llava"))([samples[0], bad, samples[1]])
    assert batch.samples == (samples[0], samples[1])
    assert [r.origin for r in batch.rejected] == ["t.json:9"]
    assert batch.rejected[0].reason.startswith("image does not decode")
    clean = Collator(processing("llava"))([samples[0], samples[1]])
    assert all(torch.equal(batch.inputs[key], clean.inputs[key]) for key in clean.inputs)


def test_a_row_the_processor_refuses(processing: Load, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    made, encode = processing("llava"), ModelProcessor.encode

    def picky(self: ModelProcessor, texts: Any, images: Any, side: Any) -> Any:
        if any(image.size == (40, 80) for row in images for image in row):
            raise ValueError("too tall for me\nsecond line")
        return encode(self, texts, images, side)

    monkeypatch.setattr(ModelProcessor, "encode", picky)
    batch = Collator(made)(samples)
    assert batch.samples == tuple(samples[:2])
    assert [r.reason for r in batch.rejected] == ["processor refuses: too tall for me"] * 2


def test_a_batch_of_nothing_is_filled_without_supervision(
    processing: Load, samples: list[Sample], pictures: dict[str, Path]
) -> None:
    made = processing("llava")
    bad = sample("<image> What?", "A.", images=(pictures["broken"],), origin="t.json:9")
    batch = Collator(made, reserve=[bad, *samples])([bad, bad])
    assert batch.samples == (samples[0],)
    assert batch.num_supervised == batch.supervised.numel() == 0
    assert {r.origin for r in batch.rejected} == {"t.json:9"}
    with pytest.raises(UserError, match="None of 1 samples"):
        Collator(made, reserve=[bad])([bad])
    nothing = PromptCollator(made)([(bad, 1)])
    assert len(nothing) == 0
    assert nothing.inputs == {}
    assert nothing.rejected


def test_questions(processing: Load, samples: list[Sample]) -> None:
    made = processing("qwen2_5_vl")
    batch = PromptCollator(made)([(samples[3], 1), (samples[0], 3), (samples[1], 1)])
    assert batch.references == ("It", "Yes, I am sure.", "Hello you")
    assert batch.inputs["image_grid_thw"].shape[0] == 2  # the second picture of samples[3] is not shown yet
    mask = batch.inputs["attention_mask"]
    assert (mask[:, -1] == 1).all()
    assert torch.equal(mask, mask.sort(dim=1).values)  # all padding is on the left
    for row, given in zip(batch.inputs["input_ids"], ("this?", "A red thing.<|im_end|>", "Hi"), strict=True):
        text = made.processor.tokenizer.decode(row)
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert given in text
        assert "Yes, I am" not in text


def test_blank_pictures_are_grey_and_of_the_same_size(processing: Load, samples: list[Sample]) -> None:
    made = processing("qwen2_5_vl")
    questions = [(samples[0], 1), (samples[2], 1)]
    seen, blank = (PromptCollator(made, blank_images=blank)(questions).inputs for blank in (False, True))
    for key in seen:
        assert torch.equal(seen[key], blank[key]) == (key != "pixel_values")
    assert seen["pixel_values"].shape == blank["pixel_values"].shape
    by_channel = blank["pixel_values"].reshape(len(blank["pixel_values"]), 3, -1)
    assert torch.equal(by_channel, by_channel[:1, :, :1].expand_as(by_channel))


def test_long_questions_fall_out(processing: Load, samples: list[Sample]) -> None:
    made = processing("llava")
    questions = [(samples[0], 1), (samples[1], 1)]
    longest = PromptCollator(made)(questions).inputs["input_ids"].shape[1]
    batch = PromptCollator(made, max_length=longest - 1)(questions)
    assert batch.samples == (samples[1],)
    assert batch.rejected[0].reason.startswith("too long: a question")
    assert batch.inputs["attention_mask"].all()


def test_collators_cross_processes_and_leave_generators_alone(processing: Load, samples: list[Sample]) -> None:
    state = torch.get_rng_state()
    collator = Collator(processing("qwen2_5_vl"), reserve=samples)
    first, second = collator(samples), pickle.loads(pickle.dumps(collator))(samples)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.supervised, second.supervised)
    assert all(torch.equal(first.inputs[key], second.inputs[key]) for key in first.inputs)


def test_the_first_frame_of_an_animation_is_told(processing: Load, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    batch = Collator(processing("llava"))([sample("<image>?", "Red", images=(tmp_path / "x.gif",))])
    assert [(r.kind, r.reason) for r in batch.rejected] == [("cut", "animated image: its first frame is used")]


def test_turns_that_are_not_to_be_learned_are_context(processing: Load, samples: list[Sample]) -> None:
    made, row = processing("qwen2_5_vl"), samples[0]
    whole = Collator(made)([row])
    turns = tuple(replace(turn, train=i != 1) for i, turn in enumerate(row.turns))
    batch = Collator(made)([replace(row, turns=turns)])
    assert torch.equal(batch.inputs["input_ids"], whole.inputs["input_ids"])
    assert made.processor.tokenizer.decode(batch.targets) == "Yes, I am sure.<|im_end|>"
    assert batch.samples[0].answers == (3,)
    none = replace(row, turns=tuple(replace(turn, train=False) for turn in row.turns))
    rejected: list[Rejection] = []
    assert Collator(made).collate_valid([none], rejected) is None
    assert [each.reason for each in rejected] == ["no answer: no turn of the row is to be learned"]


def test_answers_without_the_reasoning_of_generation_are_counted(processing: Load, samples: list[Sample]) -> None:
    made = processing("qwen3_vl")
    made.template = QWEN3_VL_THINKING
    batch = Collator(made)([samples[0]])
    assert made.processor.tokenizer.decode(batch.targets) == "\n</think>\n\nYes, I am sure.<|im_end|>"
    assert [(each.kind, each.reason.partition(":")[0]) for each in batch.rejected] == [("cut", "earlier answers")]


def test_too_many_images_are_refused_by_name(processing: Load, samples: list[Sample]) -> None:
    batch = Collator(processing("llava"), max_images=1)(samples)
    assert batch.samples == tuple(samples[:2])
    assert {each.reason for each in batch.rejected} == {"too many images: the row has 2, data.max_images is 1"}
    assert not Collator(processing("llava"), max_images=2)(samples).rejected


def test_special_tokens_that_are_named(processing: Load) -> None:
    made = processing("qwen2_5_vl")
    made.processor.tokenizer.add_tokens(["<|box_start|>", "<|box_end|>"], special_tokens=True)
    made = ModelProcessor(made.processor, made.config)
    row = sample("Where?", "<|box_start|>(1,2)<|box_end|>")
    batch = Collator(made, special_tokens=["<|box_start|>", "<|box_end|>"])([row])
    assert made.processor.tokenizer.decode(batch.targets) == "<|box_start|>(1,2)<|box_end|><|im_end|>"
    with pytest.raises(UserError, match="special token in the text"):
        Collator(made, special_tokens=["<|box_start|>"])([row])


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "a.mp4", 40)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "llava_onevision", "smolvlm", "internvl", "gemma3", "mllama"])
def test_a_video_is_its_frames(
    name: str, processing: Load, video: Path, pictures: dict[str, Path], tmp_path: Path
) -> None:
    """The same batch as of a row with the frames as images, in their place among others."""
    frames = [pictures["wide"], *(tmp_path / f"{i}.png" for i in range(3)), pictures["tall"]]
    for file, frame in zip(frames[1:4], videos.load(video, 3), strict=True):
        frame.save(file)
    turns = (Turn("user", "<image> and <video> and <image>?"), Turn("assistant", "All."))
    row = Sample("1", turns, (pictures["wide"], pictures["tall"]), "t.json:1", videos=(video,))
    batch = Collator(processing(name), video_frames=3)([row])
    truth = Collator(processing(name))(
        [sample("<image> and <image><image><image> and <image>?", "All.", images=tuple(frames))]
    )
    assert not batch.rejected
    assert batch.inputs.keys() == truth.inputs.keys()
    assert all(torch.equal(batch.inputs[key], truth.inputs[key]) for key in truth.inputs)
    assert torch.equal(batch.supervised, truth.supervised)
    asked = PromptCollator(processing(name), video_frames=3)([(row, 1)])
    assert asked.inputs["input_ids"].shape[0] == 1
    blank = Collator(processing(name), video_frames=3).collate_valid([row], [], blank_images=True)
    assert blank is not None
    assert torch.equal(blank.inputs["input_ids"], batch.inputs["input_ids"])
    assert blank.inputs["pixel_values"].shape == batch.inputs["pixel_values"].shape


def test_a_video_is_never_letters(processing: Load, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, turns = processing("qwen2_vl"), (Turn("user", "<video>\nWhat?"), Turn("assistant", "A <video> tag."))
    cases = {
        "marks and files differ": Sample("1", turns, (), "t.json:1"),
        "marks and files": Sample("1", turns, (), "t.json:1", videos=(video, video)),
        "missing video": Sample("1", turns, (), "t.json:1", videos=(video.with_name("none.mp4"),)),
    }
    for reason, row in cases.items():
        rejected: list[Rejection] = []
        assert Collator(made).collate_valid([row], rejected) is None
        assert [each.reason.startswith(reason) for each in rejected] == [True]
    encode = ModelProcessor.encode

    def one_image(self: ModelProcessor, texts: Any, images: Any, side: Any) -> Any:
        if any(len(row) > 1 for row in images):
            raise ValueError("one image at most")
        return encode(self, texts, images, side)

    monkeypatch.setattr(ModelProcessor, "encode", one_image)
    with pytest.raises(UserError, match="video: this model takes none"):
        Collator(made)([Sample("1", turns, (), "t.json:1", videos=(video,))])


def test_a_large_photo_fits_within_bounds(processing: Load, tmp_path: Path) -> None:
    """12 megapixels, at the patch sizes of Qwen2.5-VL itself."""
    Image.new("RGB", (4000, 3000)).save(tmp_path / "photo.jpg")
    made = processing("qwen2_5_vl")
    image_processor = made.processor.image_processor
    image_processor.patch_size = 14
    image_processor.size = type(image_processor.size)(shortest_edge=56 * 56, longest_edge=12_845_056)
    row, rejected = sample("<image>\nWhat?", "A.", images=(tmp_path / "photo.jpg",)), list[Rejection]()
    assert Collator(made, 2048).collate_valid([row], rejected) is None
    assert "image tokens up to 15" in rejected[0].reason
    assert "data.max_pixels" in rejected[0].reason
    made.bound_pixels(PixelBounds(max_pixels=1_000_000))
    assert not Collator(made, 2048)([row]).rejected
