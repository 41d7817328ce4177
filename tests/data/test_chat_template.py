"""What is learned of conversations that reason and call tools; the truth of each template is written here by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import trl

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data.chat import ChatError, ChatRenderer, Rendered
from lightning_mm.data.sample import Turn
from lightning_mm.models.processor import ModelProcessor
from tests.helpers import chat_templates as templates

Make = Callable[[str], ModelProcessor]
USER = Turn("user", "<image>\nWhat is it?")
THOUGHT = (USER, Turn("assistant", "A cat.", reasoning="It has whiskers."))
TWICE = (*THOUGHT, Turn("user", "Sure?"), Turn("assistant", "Yes.", reasoning="I looked."))
PLAIN = (USER, Turn("assistant", "A cat."), Turn("user", "Sure?"), Turn("assistant", "Yes."))
TOOLS = json.dumps([{"type": "function", "function": {"name": "zoom", "parameters": {"type": "object"}}}])
CALL = json.dumps([{"id": "c1", "type": "function", "function": {"name": "zoom", "arguments": '{"factor": 2}'}}])
CALLED = (
    USER,
    Turn("assistant", "", reasoning="It is small.", tool_calls=CALL),
    Turn("tool", "done"),
    Turn("assistant", "A cat.", reasoning="Now I see."),
)


@pytest.fixture
def make(processing: Callable[[str], ModelProcessor]) -> Make:
    """A processor with another template."""

    def with_template(template: str) -> ModelProcessor:
        made = processing("qwen3_vl")
        made.processor.tokenizer.add_tokens(["<think>", "</think>"])
        made.template = template
        return made

    return with_template


def learned(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


# template, conversation -> what is learned, and how many answers are only context
TRUTH: dict[str, tuple[str, tuple[Turn, ...], list[str], int]] = {
    "qwen3, reasoning": (
        templates.QWEN3,
        TWICE,
        ["<think>\nI looked.\n</think>\n\nYes.<|im_end|>"],
        1,
    ),
    "qwen3, one answer": (
        templates.QWEN3,
        THOUGHT,
        ["<think>\nIt has whiskers.\n</think>\n\nA cat.<|im_end|>"],
        0,
    ),
    "qwen3, reasoning within the answer": (
        templates.QWEN3,
        (USER, Turn("assistant", "<think>\nIt has whiskers.\n</think>\n\nA cat.")),
        ["<think>\nIt has whiskers.\n</think>\n\nA cat.<|im_end|>"],
        0,
    ),
    "qwen3, no reasoning": (templates.QWEN3, PLAIN, ["<think>\n\n</think>\n\nYes.<|im_end|>"], 1),
    "qwen3-vl-thinking, reasoning": (
        templates.QWEN3_VL_THINKING,
        TWICE,
        ["I looked.\n</think>\n\nYes.<|im_end|>"],
        1,
    ),
    "qwen3-vl-thinking, no reasoning": (
        templates.QWEN3_VL_THINKING,
        PLAIN,
        ["\n</think>\n\nYes.<|im_end|>"],
        1,
    ),
    "qwen3-vl-thinking, tools": (
        templates.QWEN3_VL_THINKING,
        CALLED,
        [
            'It is small.\n</think>\n\n\n<tool_call>\n{"name": "zoom", "arguments": {"factor": 2}}\n</tool_call>'
            "<|im_end|>",
            "Now I see.\n</think>\n\nA cat.<|im_end|>",
        ],
        0,
    ),
    "glm-4v, reasoning": (templates.GLM_4V, TWICE, ["<think>I looked.</think>\nYes.<|im_end|>"], 1),
    "glm-4v, no reasoning": (
        templates.GLM_4V,
        PLAIN,
        ["<think></think>\nA cat.<|im_end|>", "<think></think>\nYes.<|im_end|>"],
        0,
    ),
    "glm-4.1v": (templates.GLM_41V, PLAIN, ["A cat.<|im_end|>", "Yes.<|im_end|>"], 0),
    "r1, no reasoning": (templates.R1, PLAIN, ["A cat.<|im_end|>", "Yes.<|im_end|>"], 0),
}


@pytest.mark.parametrize("name", TRUTH)
def test_what_is_learned(make: Make, name: str) -> None:
    template, turns, truth, num_context = TRUTH[name]
    rendered = ChatRenderer(make(template)).render(turns, tools=TOOLS if turns is CALLED else "")
    assert learned(rendered) == truth
    assert rendered.num_context == num_context


@pytest.mark.parametrize("name", TRUTH)
def test_it_is_what_follows_the_generation_prompt(make: Make, name: str) -> None:
    """What precedes each learned span is the prompt of generation, but for a place that no answer is written with."""
    template, turns, _, _ = TRUTH[name]
    chat = ChatRenderer(make(template))
    tools = TOOLS if turns is CALLED else ""
    rendered = chat.render(turns, tools=tools)
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"][-len(rendered.spans) :]
    for (start, _), answer in zip(rendered.spans, answers, strict=True):
        prompt = chat.render(turns[:answer], add_generation_prompt=True, tools=tools).text
        assert rendered.text[:start] == (prompt.removesuffix("<think>\n") if template is templates.R1 else prompt)
    assert (
        make(template).num_tokens([chat.render_unmarked(turns, tools), rendered.text])[0]
        == (make(template).num_tokens([rendered.text])[0])
    )


def test_an_opening_that_no_answer_is_written_with_is_said(make: Make) -> None:
    decision_log().clear()
    ChatRenderer(make(templates.R1))
    assert [d.value for d in decision_log() if d.name == "data.generation_prompt"] == [
        "answers are learned without '<think>\\n'"
    ]


PUBLISHED = {
    "qwen3_5_think": (["I looked.\n</think>\n\nYes.<|im_end|>"], ["\n</think>\n\nYes.<|im_end|>"]),
    "qwen3_6": (["I looked.\n</think>\n\nYes.<|im_end|>"], ["\n</think>\n\nYes.<|im_end|>"]),
    "lfm2_2_5_vl": (["<think>I looked.</think>Yes.<|im_end|>"], ["A cat.<|im_end|>", "Yes.<|im_end|>"]),
    "qwen3_vl": (None, ["A cat.<|im_end|>", "Yes.<|im_end|>"]),
    "qwen2_5_vl": (None, ["A cat.<|im_end|>", "Yes.<|im_end|>"]),
    "gemma3": (None, ["A cat.<end_of_turn>", "Yes.<end_of_turn>"]),
    "smolvlm": (None, [" A cat.<end_of_utterance>", " Yes.<end_of_utterance>"]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_templates_as_published(make: Make, name: str) -> None:
    """TRL keeps the templates of models on the hub: what is learned with and without reasoning."""
    text = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    processor = make("").processor
    marks = ["<image>", "<start_of_image>", "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>"]
    processor.tokenizer.add_tokens(marks, special_tokens=True)
    processing = ModelProcessor(processor, make("").config)
    processing.template = text
    chat = ChatRenderer(processing)
    reasoning, plain = PUBLISHED[name]
    assert learned(chat.render(PLAIN)) == plain
    if reasoning is None:
        with pytest.raises(ChatError, match="no place for reasoning"):
            chat.render(TWICE)
    else:
        assert learned(chat.render(TWICE)) == reasoning
    for turns in (PLAIN, *([TWICE] if reasoning else [])):
        rendered = chat.render(turns)
        assert rendered.text[: rendered.spans[-1][0]] == chat.render(turns[:3], add_generation_prompt=True).text


LOST = {
    "reasoning": (templates.GLM_41V, THOUGHT, "", "reasoning"),
    "reasoning that every turn loses": (templates.R1, THOUGHT, "", "reasoning"),
    "tools": (templates.GLM_4V, PLAIN, TOOLS, "tools"),
    "calls": (templates.GLM_4V, CALLED[:2], "", "tool calls"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_the_template_has_no_place_for_is_refused_by_name(make: Make, name: str) -> None:
    template, turns, tools, what = LOST[name]
    chat = ChatRenderer(make(template))
    with pytest.raises(ChatError, match=f"template has no place for {what}"):
        chat.render(turns, tools=tools)
    chat.render(PLAIN)  # what it has a place for is not


def test_turns_that_do_not_train_are_context(make: Make) -> None:
    chat = ChatRenderer(make(templates.GLM_41V))
    first = (USER, Turn("assistant", "A cat.", train=False), *PLAIN[2:])
    assert learned(chat.render(first)) == ["Yes.<|im_end|>"]
    assert chat.render(first).text == chat.render(PLAIN).text  # an earlier answer ends as one that was generated
    assert learned(chat.render((*PLAIN[:3], Turn("assistant", "Yes.", train=False)))) == ["A cat.<|im_end|>"]


FORGED = {
    "reasoning": (Turn("assistant", "A.", reasoning="x<|im_end|>"), ""),
    "call": (Turn("assistant", "A.", tool_calls=CALL.replace("factor", "<|image_pad|>")), ""),
    "escaped": (Turn("assistant", "A.", tool_calls=CALL.replace("factor", "\\\\u003c|image_pad|>")), ""),
    "tool": (Turn("assistant", "A."), TOOLS.replace("object", "\\u003c|image_pad|>")),
    "result": (Turn("tool", "<|image_pad|>"), ""),
}


@pytest.mark.parametrize("name", FORGED)
def test_special_tokens_are_refused_wherever_they_stand(make: Make, name: str) -> None:
    turn, tools = FORGED[name]
    turns = (USER, turn) if turn.role == "assistant" else (*CALLED[:2], turn, CALLED[3])
    with pytest.raises(ChatError, match="special token in the text"):
        ChatRenderer(make(templates.QWEN3)).render(turns, tools=tools)


@pytest.mark.parametrize("calls", ["{", "{}", "[1]", '[{"function": {}}]', '[{"name": "f", "arguments": "{"}]'])
def test_calls_that_are_none_are_refused(make: Make, calls: str) -> None:
    with pytest.raises(ChatError, match="tool calls"):
        ChatRenderer(make(templates.QWEN3)).render((USER, Turn("assistant", "A.", tool_calls=calls)))


BOX = ("<|box_start|>", "<|box_end|>")


@pytest.fixture
def boxes(make: Make) -> ModelProcessor:
    made = make(templates.QWEN3)
    made.processor.tokenizer.add_tokens([*BOX, "<|object_ref_start|>"], special_tokens=True)
    return ModelProcessor(made.processor, made.config)


def test_named_special_tokens_are_allowed(boxes: ModelProcessor) -> None:
    said = Turn("assistant", "<|box_start|>(1,2),(3,4)<|box_end|>")
    with pytest.raises(ChatError, match="special token in the text"):
        ChatRenderer(boxes).render((USER, said))
    chat = ChatRenderer(boxes, BOX)
    assert learned(chat.render((USER, said)))[-1].endswith(f"{said.text}<|im_end|>")
    chat.render((Turn("user", "What is at <|box_start|>(1,2)<|box_end|>?"), Turn("assistant", "A cat.")))
    for other in ("<|object_ref_start|>", "<|im_end|>", "<|image_pad|>"):
        with pytest.raises(ChatError, match="special token in the text"):
            chat.render((USER, Turn("assistant", f"{BOX[0]}{other}")))


RESERVED = ["<|image_pad|>", "<|vision_start|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]


@pytest.mark.parametrize("token", [*RESERVED, "<|no_token|>", "cat"])
def test_only_tokens_that_are_but_text_can_be_named(boxes: ModelProcessor, token: str) -> None:
    with pytest.raises(UserError, match=r"data\.special_tokens cannot allow") as caught:
        ChatRenderer(boxes, [token])
    assert "<|box_start|>" in caught.value.fix
