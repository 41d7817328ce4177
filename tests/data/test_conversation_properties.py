"""Any conversation becomes a batch that learns exactly its answers, or a counted drop; never an exception."""

import json
import operator
import re
from collections.abc import Callable
from functools import cache
from io import BytesIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_mm.data.batch import Batch, TokenRegion
from lightning_mm.data.collator import Collator
from lightning_mm.data.image_source import ImageBytes
from lightning_mm.data.sample import Rejection, Sample, Turn
from lightning_mm.models.processor import ModelProcessor
from tests.helpers import chat_templates as templates

KINDS = {
    "chatml": ("qwen3_vl", None),
    "default system prompt": ("qwen2_vl", None),
    "no stop token": ("llava", None),
    "no header": ("llava_next", None),
    "trims": ("gemma3", None),
    "qwen3": ("qwen3_vl", templates.QWEN3),
    "qwen3-vl-thinking": ("qwen3_vl", templates.QWEN3_VL_THINKING),
    "glm-4v": ("qwen3_vl", templates.GLM_4V),
    "glm-4.1v": ("qwen3_vl", templates.GLM_41V),
    "r1": ("qwen3_vl", templates.R1),
}
TOOLS = json.dumps([{"type": "function", "function": {"name": "zoom", "parameters": {"type": "object"}}}])
CALL = json.dumps([{"function": {"name": "zoom", "arguments": {"x": "<b>"}}}])
ODD = ["<image>", "<video>", "</s>", "<|im_end|>", "<|im_start|>user\n", "a\n<image>\nb"]
"""What stands for something else, or could pose as it."""
EVEN = [
    "A cat.",
    "yes",
    "assistant",
    "USER: ",
    "<think>so</think>yes",
    "</think>",
    "\u00e9\U0001f469\u200d\U0001f467",
    "\u202eabc",
]
WORDS = st.one_of(
    st.text(max_size=30), st.text(" \n\t\ufeffaA.", max_size=8), *[st.sampled_from(EVEN)] * 6, st.sampled_from(ODD)
)
SELDOM = st.integers(0, 12).map(lambda number: number == 7)
TEXTS = st.lists(WORDS, min_size=1, max_size=2).map("".join)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """A conversation, mostly of the usual order; the number of images mostly fits the marks."""
    turns: list[Turn] = []
    if draw(st.booleans()):
        turns.append(Turn("system", draw(TEXTS)))
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Turn("user", draw(st.sampled_from(["", "<image>\n"])) + draw(TEXTS)))
        reasoning = draw(st.one_of(*[st.just("")] * 5, TEXTS))
        answer = Turn("assistant", draw(TEXTS), train=draw(SELDOM.map(operator.not_)), reasoning=reasoning)
        if draw(SELDOM):
            turns += [Turn("assistant", "", tool_calls=CALL), Turn("tool", draw(TEXTS))]
        turns.append(answer)
    if draw(SELDOM):
        turns = draw(st.permutations(turns))
    marks = sum(turn.text.count("<image>") for turn in turns if turn.role == "user")
    num_images = max(0, marks + draw(st.sampled_from([*[0] * 15, 1, -1])))
    return Sample("1", tuple(turns), (PICTURE,) * num_images, "t.json:1", tools=TOOLS if draw(SELDOM) else "")


def _picture() -> ImageBytes:
    file = BytesIO()
    Image.new("RGB", (20, 16), "red").save(file, "PNG")
    return ImageBytes("p.png", file.getvalue())


PICTURE = _picture()
Load = Callable[[str], tuple[Collator, str]]


@pytest.fixture(scope="session")
def collators(processing: Callable[[str], ModelProcessor]) -> Load:
    """The collator of a kind of template, and the token that ends its answers."""

    @cache
    def load(kind: str) -> tuple[Collator, str]:
        family, template = KINDS[kind]
        made = processing(family)
        if template is not None:
            made.template = template
        return Collator(made), made.processor.tokenizer.eos_token

    return load


# What a template may change about a text that it writes: spaces around it, and around the place for reasoning.
def spaceless(text: str) -> str:
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(sample=samples())
def test_a_conversation_is_learned_exactly_or_dropped(collators: Load, kind: str, sample: Sample) -> None:
    collator, stop = collators(kind)
    rejected: list[Rejection] = []
    batch = collator.collate_valid([sample], rejected)
    dropped = [each for each in rejected if each.kind == "dropped"]
    assert all(re.match(r"[^:]+: .", each.reason) for each in rejected)
    if batch is None:
        assert len(dropped) == 1
        assert dropped[0].origin == sample.origin
        return
    assert not dropped
    check_learned(collator, batch, sample, stop, rejected, is_exact=kind in ("chatml", "default system prompt"))


def check_learned(
    collator: Collator, batch: Batch, sample: Sample, stop: str, rejected: list[Rejection], is_exact: bool
) -> None:
    """The supervised tokens are answers that train, each with its stop; others are counted."""
    tokenizer = collator.processing.processor.tokenizer
    said = tokenizer.decode(batch.targets).split(stop)
    assert said.pop().strip() == ""
    counted = sum(int(re.findall(r"\d+", each.reason)[0]) for each in rejected if each.reason.startswith("earlier"))
    wanted = [sample.turns[i] for i in sample.answers]
    assert len(said) == len(wanted) - counted > 0
    following = iter(wanted)  # those that are counted may lie between
    assert all(any(is_written(text, turn, is_exact) for turn in following) for text in said)
    regions = batch.regions[0]
    assert (regions == TokenRegion.ANSWER).sum() == batch.num_supervised
    assert (batch.regions.flatten()[batch.supervised + 1] == TokenRegion.ANSWER).all()


def is_written(text: str, turn: Turn, is_exact: bool) -> bool:
    """Whether a text is what a template writes for a turn."""
    if is_exact:
        return text == turn.text
    answer = re.sub(r"</?think>", "", turn.reasoning + turn.text) + call_text(turn)
    return spaceless(re.sub(r"</?think>", "", text)) == spaceless(answer)


def call_text(turn: Turn) -> str:
    """How the templates here write the call."""
    return '<tool_call>{"name": "zoom", "arguments": {"x": "<b>"}}</tool_call>' if turn.tool_calls else ""
