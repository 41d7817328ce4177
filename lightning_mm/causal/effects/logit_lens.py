"""The logit lens: what the model would say if a hidden state were its last, of words and of the picture's tokens.

Data flow: ``Recording`` (streams) -> the model's own norm, head, scaling and soft-capping (``readout``) -> top words
per token, ranks and probabilities of given words, entries of pictures.json.

Layer i is what block i puts out, -1 what enters the first block. What a model adds between blocks (Qwen3-VL's features
of the tower) is not in what a block puts out; it enters the next one.

Shapes: P positions, N layers, V vocabulary, T words' tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mm.causal.effects.image_overlays import PictureGrid, entry
from lightning_mm.causal.interventions.activation_cache import Recording
from lightning_mm.causal.questions.question import Asked
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import read_out


def lens(mm: MultimodalModel, recording: Recording, layer: int, positions: Tensor) -> Tensor:
    """(P, V) float32 logits of a layer's hidden states; at the last layer and token these are the model's own.

    Args:
        mm: The plain model in eval mode.
        recording: Of one question, with the site ``residual``.
        layer: Decoder block, or -1.
        positions: (P,) tokens.
    """
    assert -1 <= layer < mm.layout.num_layers
    stream = recording.entered[0] if layer == -1 else recording.values["residual", layer]
    return read_out(mm, stream[0, positions.to(stream.device)], recording.tuples)


@dataclass(frozen=True, eq=False)
class Ranks:
    """How high a word comes.

    Args:
        rank: (N, P) 1 is the most likely of all tokens; the best of the word's tokens counts.
        probability: (N, P) of all the word's tokens together.
    """

    rank: Tensor
    probability: Tensor


def word_ranks(
    mm: MultimodalModel,
    recording: Recording,
    layers: Sequence[int],
    positions: Tensor,
    tokens: Sequence[int],
) -> Ranks:
    """Rank and probability of a word at tokens, by layer: of an object's name at its patches (Neo et al. 2024).

    Args:
        mm: The plain model in eval mode.
        recording: Of one question, with the site ``residual``.
        layers: N of them, -1 among them if wanted.
        positions: (P,) tokens; ``PictureGrids.shown`` gives those that show an object.
        tokens: Of the word, as ``word_tokens`` gives them.
    """
    ranks, chances = [], []
    for layer in layers:
        logits_PV = lens(mm, recording, layer, positions)
        best_P = logits_PV[:, list(tokens)].amax(1)
        ranks.append((logits_PV > best_P[:, None]).sum(1) + 1)
        chances.append(logits_PV.softmax(-1)[:, list(tokens)].sum(1))
    return Ranks(torch.stack(ranks).cpu(), torch.stack(chances).cpu())


def word_tokens(tokenizer: Any, word: str) -> list[int]:
    """The tokens that a word can begin with: at the start of a text and after a blank, as written and in small letters.

    A token of blanks only says nothing of the word and is passed over.
    """
    found: dict[int, None] = {}
    for written in dict.fromkeys((word, f" {word}", word.lower(), f" {word.lower()}")):
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        first = next((token for token in ids if tokenizer.decode([token]).strip()), None)
        if first is not None:
            found[first] = None
    assert found, f"{word!r} has no tokens"
    return list(found)


def top_words(
    mm: MultimodalModel,
    recording: Recording,
    layer: int,
    positions: Tensor,
    decode: Callable[[list[int]], str],
    count: int = 1,
) -> tuple[list[list[str]], Tensor]:
    """The most likely words at tokens.

    Args:
        mm: The plain model in eval mode.
        recording: Of one question, with the site ``residual``.
        layer: Decoder block, or -1.
        positions: (P,) tokens.
        decode: The tokenizer's.
        count: Words of each token.

    Returns:
        Words of each token, the most likely first, and (P, count) their probabilities.
    """
    chance_PC, token_PC = lens(mm, recording, layer, positions).softmax(-1).topk(count, -1)
    return [[decode([token]) for token in row] for row in token_PC.tolist()], chance_PC.cpu()


def picture_words(
    mm: MultimodalModel,
    recording: Recording,
    asked: Asked,
    grid: PictureGrid,
    layer: int,
    decode: Callable[[list[int]], str],
) -> dict[str, Any]:
    """The most likely word of every patch and its probability, as an entry of pictures.json without ``image``."""
    words, chance_P1 = top_words(mm, recording, layer, asked.image, decode)
    shown = entry(asked, grid, f"logit lens, layer {layer}", layer, chance_P1[:, 0])
    return {**shown, "words": grid.laid_out([row[0] for row in words])}
