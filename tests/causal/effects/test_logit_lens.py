"""The lens at the last layer is the model's word; ranks and maps are of the right tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_mm.causal.effects.image_overlays import PictureGrid
from lightning_mm.causal.effects.logit_lens import logit_lens, picture_words, top_words, word_ranks, word_tokens
from lightning_mm.causal.interventions.activation_cache import cache_activations
from tests.helpers.causal_models import FAMILIES, subject


@pytest.mark.parametrize("name", FAMILIES)
def test_at_the_last_layer_it_is_the_models_own(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, name, tmp_path)
    encoded = one.encode()
    run = cache_activations(one.mm, encoded.inputs)
    top, last = one.layout.num_layers - 1, torch.tensor([encoded.length - 1])
    assert torch.equal(logit_lens(one.mm, run, top, last), run.logits)
    whole = one.model(**encoded.inputs).logits[0]
    everywhere = logit_lens(one.mm, run, top, torch.arange(encoded.length))
    torch.testing.assert_close(everywhere, whole, atol=1e-5, rtol=1e-5)
    for layer in range(-1, top):
        assert not torch.allclose(logit_lens(one.mm, run, layer, last), run.logits)


def test_soft_capped_and_tied_heads_are_read_as_the_model_does(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "gemma3", tmp_path)
    assert one.layout.tied_head
    # The tiny families have no soft-capping of their own: any head's way of putting out logits must be kept.
    one.model.lm_head.register_forward_hook(lambda _, __, logits: 0.1 * torch.tanh(logits / 0.1))
    encoded = one.encode()
    run, last = cache_activations(one.mm, encoded.inputs), torch.tensor([encoded.length - 1])
    assert torch.equal(logit_lens(one.mm, run, one.layout.num_layers - 1, last), run.logits)
    for layer in range(-1, one.layout.num_layers):
        assert logit_lens(one.mm, run, layer, encoded.image).abs().max() <= 0.1


def test_ranks_and_words_are_those_of_the_logits(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    encoded, tokenizer = one.encode(), one.processing.processor.tokenizer
    run = cache_activations(one.mm, encoded.inputs)
    tokens = word_tokens(tokenizer, "Red")
    assert {tokenizer.decode([token]).strip() for token in tokens} <= {"Red"[: i + 1] for i in range(3)} | {
        "red"[: i + 1] for i in range(3)
    }
    found = word_ranks(one.mm, run, [-1, 1, 3], encoded.image, tokens)
    assert found.rank.shape == found.probability.shape == (3, len(encoded.image))
    for row, layer in enumerate((-1, 1, 3)):
        logits = logit_lens(one.mm, run, layer, encoded.image)
        order = logits.argsort(1, descending=True)
        places = torch.stack([(order == token).int().argmax(1) for token in tokens]).amin(0) + 1
        assert torch.equal(found.rank[row], places)
        torch.testing.assert_close(found.probability[row], logits.softmax(1)[:, tokens].sum(1))
    words, chances = top_words(one.mm, run, 1, encoded.image[:2], tokenizer.decode, count=3)
    logits = logit_lens(one.mm, run, 1, encoded.image[:2])
    assert words == [[tokenizer.decode([t]) for t in row] for row in logits.topk(3, 1).indices.tolist()]
    torch.testing.assert_close(chances[:, 0], logits.softmax(1).amax(1))


def test_words_lie_over_the_picture_row_by_row(family: Callable[[str], Path], tmp_path: Path) -> None:
    one = subject(family, "llava", tmp_path)
    encoded, decode = one.encode(), one.processing.processor.tokenizer.decode
    run = cache_activations(one.mm, encoded.inputs)
    shown = picture_words(one.mm, run, encoded, PictureGrid(4, 4, 0, None), 2, decode)
    words, chances = top_words(one.mm, run, 2, encoded.image, decode)
    assert shown["words"][1] == [row[0] for row in words[4:8]]
    assert shown["weights"][3] == chances[12:, 0].tolist()
    assert (shown["grid"], shown["layer"], shown["what"]) == ([4, 4], 2, "logit lens, layer 2")
