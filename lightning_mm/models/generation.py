"""Greedy generation of answers, independent of the model's generation config.

Data flow: left-padded questions -> ``generate`` -> new tokens -> text without special tokens.

Shapes: B rows, L tokens after padding, N new tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}


"""Options of ``generate`` that override every setting of a generation config that changes the answer."""


@torch.no_grad()
def greedy_tokens(model: Any, inputs: Mapping[str, Tensor], max_new_tokens: int) -> Tensor:
    """(B, N) the new tokens of each row's greedy answer, padded after its end; arguments as in ``greedy_answers``."""
    output: Tensor = model.generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY)
    return output[:, inputs["input_ids"].shape[1] :]


def greedy_answers(
    model: Any, processor: ProcessorMixin, inputs: Mapping[str, Tensor], max_new_tokens: int
) -> list[str]:
    """The model's greedy answer to each row's question.

    Args:
        model: A transformers model.
        processor: The model's processor (transformers).
        inputs: Inputs of ``generate``; ``input_ids`` (B, L), left-padded.
        max_new_tokens: Maximum length of an answer in tokens.
    """
    new = greedy_tokens(model, inputs, max_new_tokens)
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
