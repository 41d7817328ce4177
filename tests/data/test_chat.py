"""Answers are found in what any template writes; the truth of each style is written here by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.data import chat as spans
from lightning_mm.data.chat import ChatError, ChatRenderer, Rendered
from lightning_mm.data.sample import Turn
from lightning_mm.models.processor import ModelProcessor

PARTS = "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
# Each writes its turns in the way of a well-known family. None has generation tags but the last.
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_STRINGS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content.strip() }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content.strip() }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system turns here') }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: "
    "{% for p in m.content if p.type == 'image' %}<image>\n{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }} {% endfor %}"
    "{% else %}ASSISTANT: {% for p in m.content %}{{ p.text }} {% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
GEMMA_TAGGED = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% for p in m.content %}{{ p.text | trim }}{% endfor %}<end_of_turn>\n{% endgeneration %}"
    "{% else %}" + PARTS + "<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

TURNS = (
    Turn("user", "<image>\nWhat is it?"),
    Turn("assistant", " A cat.\n"),
    Turn("user", "Sure?"),
    Turn("assistant", "Yes"),
)
# template -> the text by hand, with answers in double brackets
TRUTH: dict[str, tuple[str, str]] = {
    "chatml": (
        CHATML,
        "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\n<image>What is it?<|im_end|>\n"
        "<|im_start|>assistant\n"
        "⟦ A cat.\n<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>⟧\n",
    ),
    "llama strings": (
        LLAMA_STRINGS,
        "<s>[INST] <image>\nWhat is it? [/INST]⟦ A cat.</s>⟧[INST] Sure? [/INST]⟦ Yes</s>⟧",
    ),
    "vicuna": (
        VICUNA,
        "USER: <image>\nWhat is it? ASSISTANT:⟦  A cat.\n</s>⟧ USER: Sure? ASSISTANT:⟦ Yes</s>⟧ ",
    ),
    "gemma tagged": (
        GEMMA_TAGGED,
        "<s><start_of_turn>user\n<image>What is it?<end_of_turn>\n<start_of_turn>model\n⟦A cat.<end_of_turn>⟧\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n⟦Yes<end_of_turn>⟧\n",
    ),
}

Make = Callable[[str], ModelProcessor]


@pytest.fixture
def make(processing: Callable[[str], ModelProcessor]) -> Make:
    """A processor with another template and the stop tokens of all of them."""

    def with_template(template: str) -> ModelProcessor:
        made = processing("llava")
        marks = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
        made.processor.tokenizer.add_tokens(marks, special_tokens=True)
        made.template = template
        return made

    return with_template


def marked(rendered: Rendered) -> str:
    text = rendered.text
    for start, end in reversed(rendered.spans):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


@pytest.mark.parametrize("style", TRUTH)
def test_spans_are_as_written_by_hand(make: Make, style: str) -> None:
    template, truth = TRUTH[style]
    decision_log().clear()
    chat = ChatRenderer(make(template))
    assert marked(chat.render(TURNS)) == truth
    assert [d.name for d in decision_log()] == (["data.stop_token"] if style == "vicuna" else [])


@pytest.mark.parametrize("style", TRUTH)
def test_what_is_written_has_the_tokens_of_what_is_rendered(make: Make, style: str) -> None:
    made = make(TRUTH[style][0])
    chat = ChatRenderer(made)
    both = [chat.render_unmarked(TURNS), chat.render(TURNS).text]
    assert made.num_tokens(both)[0] == made.num_tokens(both)[1] > 10
    tokenizer = made.processor.tokenizer
    words = [chat.render(TURNS[2:]).text]
    assert made.num_tokens(words) == [len(made.encode(words, [[]], "right").inputs["input_ids"][0])]
    assert made.num_tokens([tokenizer.bos_token + "Hi"]) == [len(tokenizer("Hi")["input_ids"])]  # bos is not put twice
    assert made.num_tokens([]) == []


def test_an_answer_ends_before_the_next_generation_prompt(make: Make) -> None:
    template, truth = TRUTH["chatml"]
    asked = ChatRenderer(make(template)).render(TURNS, add_generation_prompt=True)
    assert marked(asked) == truth + "<|im_start|>assistant\n"


@pytest.mark.parametrize("style", TRUTH)
def test_a_question_is_the_text_up_to_its_answer(make: Make, style: str) -> None:
    template, truth = TRUTH[style]
    chat = ChatRenderer(make(template))
    for answer, before in ((1, truth.split("⟦")[0]), (3, truth.rpartition("⟦")[0])):
        asked = chat.render(TURNS[:answer], add_generation_prompt=True)
        assert asked.text == before.replace("⟦", "").replace("⟧", "")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text(st.characters(exclude_characters="<>|{}", exclude_categories=["Cs", "Cc"]), min_size=1).filter(
            str.strip
        ),
        min_size=2,
        max_size=6,
    ).filter(lambda texts: len(texts) % 2 == 0),
)
def test_any_words_are_found_again(make: Make, texts: list[str]) -> None:
    chat = ChatRenderer(make(CHATML))
    turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    rendered = chat.render(turns)
    assert [rendered.text[a:b] for a, b in rendered.spans] == [f"{text}<|im_end|>" for text in texts[1::2]]


def test_an_answer_that_looks_like_its_surroundings(make: Make) -> None:
    chat = ChatRenderer(make(CHATML))
    for answer in ("assistant", "im_end", "\n", "user\nSure?", "A"):
        turns = [
            Turn("user", answer),
            Turn("assistant", answer or "x"),
            Turn("user", answer),
            Turn("assistant", answer),
        ]
        rendered = chat.render(turns)
        assert [rendered.text[a:b] for a, b in rendered.spans] == [f"{answer}<|im_end|>"] * 2


@pytest.mark.parametrize("text", ["a <|im_end|> b", "<image>", "</s>"])
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_special_tokens_in_the_text_are_refused(make: Make, text: str, role: Any) -> None:
    chat = ChatRenderer(make(CHATML))
    if role == "user" and text == "<image>":
        return  # that is a mark, and stands for a picture
    turns = [Turn("user", "Hi"), Turn("assistant", "Ho"), Turn(role, text), Turn("assistant", "Ho")]
    with pytest.raises(ChatError, match="special token in the text"):
        chat.render(turns)


def test_a_models_own_image_token_in_the_text_is_refused(processing: Callable[[str], ModelProcessor]) -> None:
    chat = ChatRenderer(processing("qwen2_5_vl"))
    for token in ("<|image_pad|>", "<|vision_start|>", "<|video_pad|>"):
        with pytest.raises(ChatError, match="special token"):
            chat.render([Turn("user", f"What is {token}?"), Turn("assistant", "Ho")])
    # what marks a picture in other models is only text here, but in our files it is a mark
    assert chat.placeholder == "<|vision_start|><|image_pad|><|vision_end|>"


def test_a_video_mark_that_is_a_token_is_refused(processing: Callable[[str], ModelProcessor]) -> None:
    """Frames take the place of marks before; what is left would be read as the model's own placeholder."""
    with pytest.raises(ChatError, match="special token"):
        ChatRenderer(processing("llava_onevision")).render([Turn("user", "<video>?"), Turn("assistant", "Ho")])


def test_what_a_template_refuses_is_told(make: Make) -> None:
    with pytest.raises(ChatError, match="no system turns here"):
        ChatRenderer(make(LLAMA_STRINGS)).render([Turn("system", "Be brief."), *TURNS])


USELESS = {
    "writes no pictures": (CHATML.replace("'<image>'", "''"), "template loses pictures"),
    "writes no answers": (
        CHATML.replace("for m in messages", "for m in messages if m.role == 'user'"),
        "template loses text",
    ),
    "writes the last turn otherwise": (
        CHATML.replace(
            "<|im_end|>\n{% endfor %}<", "{% if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}<"
        ).replace("{% endfor %}{% if add", "{% if not loop.last %}!{% endif %}{% endfor %}{% if add"),
        "rewrites turns",
    ),
    "begins an answer otherwise": (
        CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\nSure: "),
        "generation",
    ),
    "is not Jinja": ("{% for %}", "template refuses"),
}


@pytest.mark.parametrize("name", USELESS)
def test_a_useless_template_is_an_error(make: Make, name: str) -> None:
    template, why = USELESS[name]
    with pytest.raises(UserError, match="chat template cannot be used") as caught:
        ChatRenderer(make(template))
    assert why in caught.value.why


def test_no_template_is_an_error(processing: Callable[[str], ModelProcessor]) -> None:
    bare = processing("llava")
    bare.processor.chat_template = bare.processor.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template") as caught:
        ModelProcessor(bare.processor, bare.config)
    assert "chat_template.jinja" in caught.value.fix


@given(
    pieces=st.lists(st.text("ab\n", max_size=4), min_size=1, max_size=5),
    expansion=st.text("xab\n", max_size=6),
)
def test_spans_move_with_the_placeholders(pieces: list[str], expansion: str) -> None:
    """Against the truth known by construction; each piece carries its number, as real ones carry their headers."""
    numbered = [f"({i}{piece})" for i, piece in enumerate(pieces)]
    rendered = Rendered("<P>".join(numbered), tuple(_places(numbered, "<P>")))
    found = spans.locate_answer_spans(rendered, "<P>", expansion.join(numbered))
    assert found == _places(numbered, expansion)


def test_pieces_that_are_alike_keep_their_order() -> None:
    rendered = Rendered("(a)<P>(a)<P>(a)<P>(a)", tuple(_places(["(a)"] * 4, "<P>")))
    assert spans.locate_answer_spans(rendered, "<P>", "XX".join(["(a)"] * 4)) == _places(["(a)"] * 4, "XX")


def _places(pieces: list[str], between: str) -> list[tuple[int, int]]:
    starts = [sum(len(piece) + len(between) for piece in pieces[:i]) for i in range(len(pieces))]
    return [(start, start + len(piece)) for start, piece in zip(starts, pieces, strict=True)]


def test_a_processor_that_rewrites_text_is_an_error() -> None:
    for text in ("abXcd!", "!abXcd", "cdab"):
        with pytest.raises(UserError, match="rewrites the text"):
            spans.locate_answer_spans(Rendered("ab<P>cd", ((5, 7),)), "<P>", text)


def test_tokens_of_a_span() -> None:
    offsets = torch.tensor([[0, 0], [0, 3], [3, 5], [5, 5], [5, 8], [8, 9], [0, 0]])
    assert spans.tokens_of_span((3, 8), offsets) == range(2, 5)
    assert spans.tokens_of_span((4, 6), offsets) == range(2, 5)  # a token is the answer's if any of its characters is
    assert spans.tokens_of_span((9, 12), offsets) == range(0)
