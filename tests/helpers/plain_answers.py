"""Conversations of one question and one answer, and their loss, by transformers alone.

Data flow: rows of question, answer and picture -> inputs with the answer behind the prompt, and the positions of its
tokens (with its stop token) -> negative log-likelihoods, one row at a time and without padding.

Shapes: L tokens, S tokens of the answer.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.helpers.plain_states import MARK, PlainModel, PlainRow, opened

ANSWERS = ("Red.", "It is a blue thing.", "No.", "One two three four.", "A cat and a dog.")


@dataclass(frozen=True)
class Talk:
    """One question and its answer; ``picture`` is empty where it is about none."""

    question: str
    answer: str
    picture: str


def write_talks(file: Path, count: int) -> list[Talk]:
    """Write conversations in LLaVA's form, every fourth without a picture, and return them."""
    rows, talks = [], []
    for number in range(count):
        picture = file.with_name(f"talk-{number}.png")
        pixels = np.random.default_rng(100 + number).integers(0, 255, (40 + 4 * (number % 3), 44, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(picture)
        talk = Talk(f"What is it{' there' * (number % 3)}?", ANSWERS[number % len(ANSWERS)], str(picture))
        talk = talk if number % 4 < 3 else Talk(talk.question, talk.answer, "")
        mark = f"{MARK}\n" if talk.picture else ""
        turns = [{"from": "human", "value": mark + talk.question}, {"from": "gpt", "value": talk.answer}]
        rows.append({"id": str(number), "conversations": turns} | ({"image": picture.name} if talk.picture else {}))
        talks.append(talk)
    file.write_text(json.dumps(rows))
    return talks


def answered(plain: PlainModel, talk: Talk) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Inputs of a talk, and the positions of the tokens of its answer, stop token included."""
    asked = [{"type": "image"}] * bool(talk.picture) + [{"type": "text", "text": talk.question}]
    user = {"role": "user", "content": asked}
    said = {"role": "assistant", "content": [{"type": "text", "text": talk.answer}]}
    prompt = plain.processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    whole = plain.processor.apply_chat_template([user, said], tokenize=False)
    assert whole.startswith(prompt)
    images = [opened(talk.picture)] if talk.picture else None
    inputs = dict(plain.processor(text=[whole], images=images, return_tensors="pt"))
    tokens = [plain.processor.tokenizer.decode([token]) for token in inputs["input_ids"][0].tolist()]
    row = PlainRow(inputs, None, [], tokens)
    return inputs, row.span(whole[len(prompt) :].rstrip("\n"))


def nll(plain: PlainModel, talk: Talk) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Summed negative log-likelihood of an answer, its number of tokens, and (S,) the most likely ones' hits."""
    inputs, at = answered(plain, talk)
    logits = plain.model(**inputs, use_cache=False).logits[0].double()
    truth = inputs["input_ids"][0, at]
    log_p = logits[[position - 1 for position in at]].log_softmax(-1)
    return -log_p[torch.arange(len(at)), truth].sum(), len(at), log_p.argmax(-1) == truth


def batch_loss(plain: PlainModel, talks: Sequence[Talk]) -> torch.Tensor:
    """Loss per token over a batch."""
    parts = [nll(plain, talk)[:2] for talk in talks]
    return torch.stack([loss for loss, _ in parts]).sum() / sum(count for _, count in parts)
