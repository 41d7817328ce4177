"""Logit lens: the model's output distribution read from intermediate hidden states, of text and of image tokens.

Data flow: ``ActivationCache`` (residual stream) -> the model's own final norm, head, scaling and soft-capping
(``read_out``) -> top words per token, ranks and probabilities of given words, entries of pictures.json.

Layer i is the output of block i, -1 the input of the first block. What a model adds between blocks (Qwen3-VL's
deepstack features) is part of the next block's input, not of a block's output.

Shapes: P positions, N layers, V vocabulary size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mm.causal.effects.image_overlays import PictureGrid, overlay_entry
from lightning_mm.causal.interventions.activation_cache import ActivationCache
from lightning_mm.causal.questions.question import EncodedQuestion
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import read_out


def logit_lens(mm: MultimodalModel, cache: ActivationCache, layer: int, positions: Tensor) -> Tensor:
    """(P, V) float32 logits of a layer's hidden states; at the last layer and token these are the model's own.

    Args:
        mm: The unwrapped model in eval mode.
        cache: Activations of one question, with the site ``residual``.
        layer: Index of the decoder block; -1: its input.
        positions: (P,) token positions.
    """
    assert -1 <= layer < mm.layout.num_layers
    stream = cache.block_inputs[0] if layer == -1 else cache.values["residual", layer]
    return read_out(mm, stream[0, positions.to(stream.device)], cache.returns_tuple)


@dataclass(frozen=True, eq=False)
class WordRanks:
    """Ranks and probabilities of a word in the logit lens.

    Args:
        rank: (N, P) rank of the word's best token; 1 is the most likely of all tokens.
        probability: (N, P) summed probability of the word's tokens.
    """

    rank: Tensor
    probability: Tensor


def word_ranks(
    mm: MultimodalModel,
    cache: ActivationCache,
    layers: Sequence[int],
    positions: Tensor,
    tokens: Sequence[int],
) -> WordRanks:
    """Rank and probability of a word at tokens, by layer, such as an object's name at its patches.

    After Neo et al. 2024, arXiv:2410.07149.

    Args:
        mm: The unwrapped model in eval mode.
        cache: Activations of one question, with the site ``residual``.
        layers: The N layers; -1 is the input of the first block.
        positions: (P,) token positions.
        tokens: First tokens of the word, as ``word_tokens`` returns them.
    """
    ranks, probs = [], []
    for layer in layers:
        logits_PV = logit_lens(mm, cache, layer, positions)
        best_P = logits_PV[:, list(tokens)].amax(1)
        ranks.append((logits_PV > best_P[:, None]).sum(1) + 1)
        probs.append(logits_PV.softmax(-1)[:, list(tokens)].sum(1))
    return WordRanks(torch.stack(ranks).cpu(), torch.stack(probs).cpu())


def word_tokens(tokenizer: Any, word: str) -> list[int]:
    """Tokens that a word can start with: at the start of a text and after a space, as written and in lower case.

    Whitespace tokens are skipped.
    """
    starts: dict[int, None] = {}
    for written in dict.fromkeys((word, f" {word}", word.lower(), f" {word.lower()}")):
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        first = next((token for token in ids if tokenizer.decode([token]).strip()), None)
        if first is not None:
            starts[first] = None
    assert starts, f"{word!r} has no tokens"
    return list(starts)


def top_words(
    mm: MultimodalModel,
    cache: ActivationCache,
    layer: int,
    positions: Tensor,
    decode: Callable[[list[int]], str],
    count: int = 1,
) -> tuple[list[list[str]], Tensor]:
    """The most likely words at tokens.

    Args:
        mm: The unwrapped model in eval mode.
        cache: Activations of one question, with the site ``residual``.
        layer: Index of the decoder block; -1: its input.
        positions: (P,) token positions.
        decode: The tokenizer's ``decode``.
        count: Number of words for each token.

    Returns:
        The ``count`` words of each token, most likely first, and their (P, count) probabilities.
    """
    chance_PC, token_PC = logit_lens(mm, cache, layer, positions).softmax(-1).topk(count, -1)
    return [[decode([token]) for token in row] for row in token_PC.tolist()], chance_PC.cpu()


def picture_words(
    mm: MultimodalModel,
    cache: ActivationCache,
    encoded: EncodedQuestion,
    grid: PictureGrid,
    layer: int,
    decode: Callable[[list[int]], str],
) -> dict[str, Any]:
    """The most likely word of every image patch and its probability, as an entry of pictures.json without ``image``."""
    words, chance_P1 = top_words(mm, cache, layer, encoded.image, decode)
    shown = overlay_entry(encoded, grid, f"logit lens, layer {layer}", layer, chance_P1[:, 0])
    return {**shown, "words": grid.laid_out([row[0] for row in words])}
