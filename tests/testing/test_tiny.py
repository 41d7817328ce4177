"""The tiny models: each family's folder loads, learns, generates and comes back the same."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, SmolVLMProcessor
from transformers.utils.import_utils import is_torchvision_available

from lightning_mm.core.errors import UserError
from lightning_mm.models.processor import optional_video_processor, save_processor
from lightning_mm.testing.tiny import FAMILIES, build_tiny
from lightning_mm.testing.tiny_processors import tiny_tokenizer

QUESTION, ANSWER = "What is in the picture?", "A red cat."
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
    {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
]
CHATML = f"<|im_start|>user\n{{}}{QUESTION}<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
QWEN = CHATML.format("<|vision_start|><|image_pad|><|vision_end|>")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IDEFICS = f"<|im_start|>User:<image>{QUESTION}<end_of_utterance>\nAssistant: {ANSWER}<end_of_utterance>\n"
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
COHERE = "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>"
# As the templates published with these families write it; LLaVA's and the Idefics' answers begin after a blank.
RENDERED = {
    "llava": f"USER: <image>\n{QUESTION} ASSISTANT: {ANSWER}</s>",
    "vipllava": f"USER: <image>\n{QUESTION} ASSISTANT: {ANSWER}</s>",
    "aya_vision": f"<BOS_TOKEN>{COHERE.format('USER')}<image>{QUESTION}<|END_OF_TURN_TOKEN|>"
    f"{COHERE.format('CHATBOT')}{ANSWER}<|END_OF_TURN_TOKEN|>",
    "llava_next": f"<s>[INST] <image>\n{QUESTION} [/INST] {ANSWER}</s>",
    "llava_onevision": CHATML.format("<image>\n"),
    "qwen2_vl": SYSTEM + QWEN,
    "qwen2_5_vl": SYSTEM + QWEN,
    "qwen3_vl": QWEN,
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "internvl": CHATML.format("<IMG_CONTEXT>\n"),
    "gemma3": f"<bos><start_of_turn>user\n<start_of_image>{QUESTION}<end_of_turn>\n"
    f"<start_of_turn>model\n{ANSWER}<end_of_turn>\n",
    "mllama": f"<|begin_of_text|>{HEADER.format('user')}<|image|>{QUESTION}<|eot_id|>"
    f"{HEADER.format('assistant')}{ANSWER}<|eot_id|>",
}


@dataclass
class Loaded:
    """One family's folder, and what transformers reads from it."""

    family: str
    folder: Path
    model: Any
    processor: Any

    def encode(
        self, talks: list[list[dict[str, Any]]], images: list[list[Image.Image]], **options: Any
    ) -> dict[str, Any]:
        texts = [self.processor.apply_chat_template(talk, **options) for talk in talks]
        return dict(self.processor(text=texts, images=images, return_tensors="pt", padding=True))


def load(folder: Path) -> tuple[Any, Any]:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with optional_video_processor():  # without torchvision, transformers loads no processor of video
        return model, AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module", params=list(FAMILIES))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = build_tiny(request.param, tmp_path_factory.mktemp(request.param) / "model", dropout=0.5)
    return Loaded(request.param, folder, *load(folder))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    wide = Image.linear_gradient("L").convert("RGB").resize((70, 40))
    return [wide, Image.radial_gradient("L").convert("RGB").resize((30, 50))]


# Every family


def test_it_is_what_it_says(loaded: Loaded) -> None:
    assert loaded.model.config.model_type == loaded.family
    assert sum(p.numel() for p in loaded.model.parameters()) < 200_000
    assert len(loaded.model.get_decoder().layers) == 4
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())


def test_it_writes_talks_as_its_family_does(loaded: Loaded) -> None:
    assert loaded.processor.apply_chat_template(TALK) == RENDERED[loaded.family]


def test_a_talk_begins_with_the_prompt_for_its_answer(loaded: Loaded) -> None:
    talk = [*TALK, {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]
    talk = [{"role": "system", "content": "Be brief."}, *talk]
    render = loaded.processor.apply_chat_template
    for i in (2, 4):
        prompt = render(talk[:i], add_generation_prompt=True)
        rest = render(talk).removeprefix(prompt)
        assert rest.lstrip().startswith(ANSWER if i == 2 else "Two."), (prompt, rest)


def test_it_learns_from_text_and_pictures(loaded: Loaded, pictures: list[Image.Image]) -> None:
    model = copy.deepcopy(loaded.model).train()
    inputs = loaded.encode([TALK, TALK], [[pictures[0]], [pictures[1]]])
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    # Weights of standard deviation 0.02 know nothing: the loss is near that of a uniform guess, log(420) = 6.
    assert 5.5 < loss.item() < 6.5
    deaf = [n for n, p in model.get_decoder().named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not deaf
    seen = [p.grad.abs().sum() for p in model.get_encoder(modality="image").parameters() if p.grad is not None]
    assert sum(seen) > 0


def test_it_sees_the_picture(loaded: Loaded, pictures: list[Image.Image]) -> None:
    loaded.model.eval()
    # Two pictures of one size: the text is the same, token for token.
    inputs = loaded.encode([TALK, TALK], [[pictures[0]], [pictures[0].rotate(180)]])
    assert torch.equal(inputs["input_ids"][0], inputs["input_ids"][1])
    with torch.no_grad():
        logits = loaded.model(**inputs).logits
    assert not torch.equal(logits[0, -1], logits[1, -1])


def test_it_generates(loaded: Loaded, pictures: list[Image.Image]) -> None:
    inputs = loaded.encode([TALK[:1]], [[pictures[1]]], prompt=True)
    made = loaded.model.eval().generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert made.shape[1] == inputs["input_ids"].shape[1] + 3
    tokenizer = loaded.processor.tokenizer
    assert loaded.model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert loaded.model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_it_takes_text_alone_and_mixed_batches(loaded: Loaded, pictures: list[Image.Image]) -> None:
    alone = [{"role": "user", "content": QUESTION}]
    for inputs in (loaded.encode([alone], None), loaded.encode([TALK, alone], [[pictures[0]], []])):
        with torch.no_grad():
            assert loaded.model.eval()(**inputs).logits.isfinite().all()


def test_it_comes_back_the_same(loaded: Loaded, pictures: list[Image.Image], tmp_path: Path) -> None:
    inputs = loaded.encode([TALK], [[pictures[0]]])
    loaded.model.eval().save_pretrained(tmp_path)
    save_processor(loaded.processor, tmp_path)
    model, processor = load(tmp_path)
    again = Loaded(loaded.family, tmp_path, model, processor).encode([TALK], [[pictures[0]]])
    assert set(again) == set(inputs)
    assert all(torch.equal(again[k], inputs[k]) for k in inputs)
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, loaded.model(**inputs).logits)


def test_dropout_drops(loaded: Loaded, pictures: list[Image.Image]) -> None:
    inputs = loaded.encode([TALK], [[pictures[0]]])
    model = copy.deepcopy(loaded.model)
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, model(**inputs).logits)
        assert not torch.equal(model.train()(**inputs).logits, model(**inputs).logits)


def test_the_seed_is_the_model(loaded: Loaded, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    same = build_tiny(loaded.family, tmp_path / "same", dropout=0.5)
    other = build_tiny(loaded.family, tmp_path / "other", dropout=0.5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    files = {p.name: p.read_bytes() for p in loaded.folder.iterdir()}
    assert {p.name: p.read_bytes() for p in same.iterdir()} == files
    assert (other / "model.safetensors").read_bytes() != files["model.safetensors"]


# Options


def test_a_model_of_another_size(tmp_path: Path) -> None:
    model, _ = load(build_tiny("qwen2_5_vl", tmp_path / "m", layers=6, hidden=64))
    assert len(model.get_decoder().layers) == 6
    assert model.get_input_embeddings().weight.shape[1] == 64


def test_llava_on_dinov2(tmp_path: Path, pictures: list[Image.Image]) -> None:
    folder = build_tiny("llava", tmp_path / "m", tower="dinov2")
    inputs = Loaded("llava", folder, *load(folder)).encode([TALK], [[pictures[0]]])
    model, _ = load(folder)
    assert type(model.model.vision_tower).__name__ == "Dinov2Model"
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("family", ["idefics3", "smolvlm", "internvl"])
def test_large_pictures_may_be_split(family: str, tmp_path: Path) -> None:
    large = Image.linear_gradient("L").convert("RGB")
    tokens = []
    for split in (False, True):
        folder = build_tiny(family, tmp_path / str(split), split_images=split)
        model, processor = load(folder)
        inputs = Loaded(family, folder, model, processor).encode([TALK], [[large]])
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()
        tokens.append(int((inputs["input_ids"] == model.config.image_token_id).sum()))
    # 4 tokens a tile: the whole picture, and beside it four tiles of a square one.
    assert tokens == [4, 20]


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bert"):
        build_tiny("bert", tmp_path / "m")
    for sizes in ({"layers": 1}, {"hidden": 40}):
        with pytest.raises(UserError, match=next(iter(sizes))):
            build_tiny("llava", tmp_path / "m", **sizes)
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="taken"):
        build_tiny("llava", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


# Parts


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_text_is_lost_in_the_tokenizer(text: str) -> None:
    tokenizer = tiny_tokenizer({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, add_bos=True)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == "<s>" + text
    assert max(ids) < len(tokenizer)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_offsets_name_the_characters_of_a_token(text: str) -> None:
    tokenizer = tiny_tokenizer({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, add_bos=True)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    covered = {i for start, end in offsets for i in range(start, end)}
    assert offsets[0] == (0, 0)
    assert covered == set(range(len(text)))


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision nothing is left out")
def test_only_a_video_processor_that_is_optional_is_left_out(tmp_path: Path) -> None:
    _, processor = load(build_tiny("qwen2_vl", tmp_path / "m"))
    assert not hasattr(processor, "video_processor")
    assert SmolVLMProcessor.get_attributes() == ["image_processor", "tokenizer", "video_processor"]
