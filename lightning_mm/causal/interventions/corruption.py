"""Corrupts a question: inputs of equal length, without the information that determines the answer.

Data flow: ``EncodedQuestion`` (and others as donors of words and images) -> ``corrupt_question`` ->
``CorruptedQuestion``: inputs, and a context in which the model must run on them.

    token      every constraint token becomes the first token of one word, "Paris" (Basu et al. 2024, arXiv:2406.04236)
    symmetric  every constraint becomes another question's constraint of equal length (Golovanevsky et al.
               2024, arXiv:2406.16320)
    image      the image becomes another question's, with as many tokens; the text stays
    gaussian   noise of 3 standard deviations is added to the embeddings of the constraint tokens (Meng et al. 2022,
               arXiv:2202.05262); far outside the training distribution
    grey       the contents of the question's boxes become grey; the text stays

A corruption that changes nothing is rejected: a constraint replaced by itself, an image replaced by itself.

Shapes: L tokens, P positions, D hidden size.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_mm.causal.questions.image_regions import encode_image, grey_out_boxes
from lightning_mm.causal.questions.question import EncodedQuestion, to_model_device
from lightning_mm.core.errors import UserError
from lightning_mm.data.sample import Rejection
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.processor import ModelProcessor

Places = Literal["all", "first"]
"""Which places of a constraint that stands in the question more than once."""
CorruptionKind = Literal["token", "symmetric", "image", "gaussian", "grey"]
CORRUPTIONS: tuple[CorruptionKind, ...] = get_args(CorruptionKind)
NOISE_SCALE = 3.0
"""Noise in standard deviations of the embeddings (Meng et al. 2022, arXiv:2202.05262)."""
_NOTHING = "corruption changes nothing"
_NO_CONSTRAINT = "no constraint in the text: this corruption overwrites one"


@dataclass(frozen=True, eq=False)
class CorruptedQuestion:
    """A corrupted question.

    Args:
        encoded: The clean question.
        kind: Kind of corruption.
        inputs: Corrupted inputs, of one row and L tokens, on the device of the clean ones; for use inside ``applied``.
        positions: (P,) tokens whose embeddings differ; all image tokens if the image differs.
        donor: Id of the question that the words or the image come from; empty if there is none.
        noise: (P, D) noise added to the embeddings at ``positions``; None: no noise.
    """

    encoded: EncodedQuestion
    kind: CorruptionKind
    inputs: dict[str, Tensor]
    positions: Tensor
    donor: str = ""
    noise: Tensor | None = None

    @contextmanager
    def applied(self, mm: MultimodalModel) -> Iterator[None]:
        """Context in which the model must run on ``inputs``: it adds the noise to the embeddings, if there is any.

        Raises:
            UserError: When the context ends, if noise was never added.
        """
        if self.noise is None:
            yield
            return
        took: list[bool] = []
        handle = mm.model.get_submodule(mm.layout.embedding).register_forward_hook(self._adding(took))
        try:
            yield
        finally:
            handle.remove()
        if not took:
            raise UserError(
                "The noise did not take effect.",
                f"The model never embedded {self.encoded.length} tokens by its token embedding.",
                "Run the model on the corrupt inputs inside the context, or choose another corruption.",
            )

    def _adding(self, took: list[bool]) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, __: Any, output_BLD: Tensor) -> Tensor | None:
            if output_BLD.ndim != 3 or output_BLD.shape[1] != self.encoded.length:
                return None  # a lookup of single tokens
            assert self.noise is not None
            took.append(True)
            noisy = output_BLD.clone()
            noisy[:, self.positions.to(noisy.device)] += self.noise.to(noisy)
            return noisy

        return hook


def corrupt_question(
    encoded: EncodedQuestion,
    kind: CorruptionKind,
    others: Sequence[EncodedQuestion],
    processing: ModelProcessor,
    mm: MultimodalModel,
    seed: int = 0,
    word: str = "Paris",
    places: Places = "all",
) -> CorruptedQuestion | Rejection:
    """Corrupt a question; a ``Rejection`` with the reason if it cannot be corrupted.

    Args:
        encoded: The clean question.
        kind: Kind of corruption, see the module docstring.
        others: Questions that words or images may be taken from, encoded with the same prompt; may include the question
            itself. Those with another answer are preferred, and of these those of the same kind.
        processing: The model's processor.
        mm: The unwrapped model; only its token embedding is used.
        seed: Seed of the noise and of the donor's choice, combined with the question's id, so that order has no effect.
        word: Word that ``token`` writes.
        places: Which places of the constraint ``token``, ``symmetric`` and ``gaussian`` corrupt: 'all', or the 'first'
            alone, as in the code released with Basu et al. 2024.

    Raises:
        UserError: There is no such kind.
    """
    if kind not in CORRUPTIONS:
        raise UserError(f"There is no corruption {kind!r}.", "It is not one of ours.", f"Use {', '.join(CORRUPTIONS)}.")
    if kind in ("token", "symmetric", "gaussian") and not len(encoded.constraint):
        return Rejection(encoded.question.id, _NO_CONSTRAINT)
    chance = random.Random(f"{seed}:{kind}:{encoded.question.id}")
    spans = encoded.spans if places == "all" or not encoded.spans else (encoded.first_place,)
    if kind == "token":
        ids = encoded.inputs["input_ids"].clone()
        ids[:, torch.cat(spans)] = first_token(processing, word)
        return _replace_tokens(encoded, kind, ids)
    if kind == "symmetric":
        return _swap_constraint(encoded, spans, others, chance)
    if kind == "gaussian":
        return _add_noise(encoded, torch.cat(spans).unique(), mm, chance.getrandbits(63))
    return _grey_boxes(encoded, processing) if kind == "grey" else _swap_picture(encoded, others, processing, chance)


def first_token(processing: ModelProcessor, word: str) -> int:
    """The first token of a word inside a sentence, where most tokenizers join it to the space before it."""
    before = "the "
    encoding = processing.processor.tokenizer(before + word, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    token_id = next((token for token, (start, end) in pairs if end > max(start, len(before))), None)
    if token_id is None:
        raise UserError(f"The word {word!r} has no token.", "The tokenizer drops it.", "Give another word.")
    return int(token_id)


def _replace_tokens(
    encoded: EncodedQuestion, kind: CorruptionKind, ids_1L: Tensor, donor: str = ""
) -> CorruptedQuestion | Rejection:
    positions = (ids_1L != encoded.inputs["input_ids"])[0].nonzero().flatten().cpu()
    if not len(positions):
        return Rejection(encoded.question.id, f"{_NOTHING}: the constraint becomes what it is")
    return CorruptedQuestion(encoded, kind, {**encoded.inputs, "input_ids": ids_1L}, positions, donor)


def _swap_constraint(
    encoded: EncodedQuestion, spans: Sequence[Tensor], others: Sequence[EncodedQuestion], chance: random.Random
) -> CorruptedQuestion | Rejection:
    """Replace each of these ranges by a donor's constraint of equal length; one donor for all of them."""
    for other in _rank_donors(encoded, others, chance):
        lent = {len(span): other.inputs["input_ids"][0, span] for span in reversed(other.spans)}
        if all(len(span) in lent for span in spans):
            ids = encoded.inputs["input_ids"].clone()
            for span in spans:
                ids[0, span] = lent[len(span)].to(ids.device)
            swapped = _replace_tokens(encoded, "symmetric", ids, other.question.id)
            if isinstance(swapped, CorruptedQuestion):
                return swapped
    lengths = ", ".join(str(len(span)) for span in spans)
    return Rejection(encoded.question.id, f"no lender: no other question has another constraint of {lengths} tokens")


def _add_noise(
    encoded: EncodedQuestion, positions: Tensor, mm: MultimodalModel, seed: int
) -> CorruptedQuestion | Rejection:
    with torch.no_grad():
        ids = to_model_device(mm, encoded.inputs)["input_ids"][0, positions]
        embedded_PD = mm.model.get_submodule(mm.layout.embedding)(ids).float().cpu()
    noise = torch.randn(embedded_PD.shape, generator=torch.Generator().manual_seed(seed))
    noise = NOISE_SCALE * embedded_PD.std() * noise
    if not noise.any():
        return Rejection(encoded.question.id, f"{_NOTHING}: the embeddings there have no spread")
    return CorruptedQuestion(encoded, "gaussian", dict(encoded.inputs), positions, noise=noise)


def _swap_picture(
    encoded: EncodedQuestion, others: Sequence[EncodedQuestion], processing: ModelProcessor, chance: random.Random
) -> CorruptedQuestion | Rejection:
    """Replace the image by another question's."""
    if not len(encoded.image):
        return Rejection(encoded.question.id, "no picture: this corruption puts another in its place")
    for other in _rank_donors(encoded, others, chance):
        if inputs := _with_picture_of(encoded, other.inputs, processing):
            return CorruptedQuestion(encoded, "image", inputs, encoded.image, other.question.id)
    return Rejection(encoded.question.id, f"no lender: no other picture of {len(encoded.image)} tokens that differs")


def _grey_boxes(encoded: EncodedQuestion, processing: ModelProcessor) -> CorruptedQuestion | Rejection:
    picture = grey_out_boxes(encoded.question)
    if isinstance(picture, Rejection):
        return picture
    inputs = _with_picture_of(encoded, encode_image(processing, picture), processing)
    if inputs is None:
        return Rejection(encoded.question.id, f"{_NOTHING}: the boxes are grey already")
    return CorruptedQuestion(encoded, "grey", inputs, encoded.image)


def _rank_donors(
    encoded: EncodedQuestion, others: Sequence[EncodedQuestion], chance: random.Random
) -> list[EncodedQuestion]:
    """Donors in random order, those with another answer first, and of these those of the same kind."""
    answer, kind = encoded.question.answer, encoded.question.kind
    order = sorted(others, key=lambda each: each.question.id)
    chance.shuffle(order)
    return sorted(order, key=lambda each: (each.question.answer == answer, each.question.kind != kind))


def _with_picture_of(
    encoded: EncodedQuestion, other: Mapping[str, Tensor], processing: ModelProcessor
) -> dict[str, Tensor] | None:
    """The question's inputs with the image of another row; None if it does not fit or is identical.

    It fits if its image tokens, including those that mark tiles, are the same token sequence.
    """
    own, theirs = (_split_inputs(inputs) for inputs in (encoded.inputs, other))
    same_tokens = torch.equal(*(_picture_tokens(x["input_ids"], processing) for x in (encoded.inputs, other)))
    # Cross-attention models: the tile masks must be equal, too.
    masks = [[x.amax(1).cpu() for _, x in sorted(text.items()) if x.ndim > 2] for text, _ in (own, theirs)]
    if not same_tokens or own[1].keys() != theirs[1].keys() or not all(map(torch.equal, *masks)):
        return None
    device = encoded.inputs["input_ids"].device
    pictures = {name: tensor.to(device) for name, tensor in theirs[1].items()}
    if all(torch.equal(pictures[name], tensor) for name, tensor in own[1].items()):
        return None
    return {**encoded.inputs, **pictures}


def _split_inputs(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A row's inputs by token, (1, L, ...), and its image inputs."""
    row = inputs["input_ids"].shape
    text = {name: tensor for name, tensor in inputs.items() if tensor.shape[:2] == row}
    return text, {name: tensor for name, tensor in inputs.items() if name not in text}


def _picture_tokens(ids_1L: Tensor, processing: ModelProcessor) -> Tensor:
    """Token ids from the first image token to the last."""
    ids = ids_1L[0].cpu()
    at = torch.isin(ids, torch.tensor(processing.image_token_ids)).nonzero().flatten()
    return ids[at[0] : at[-1] + 1] if len(at) else ids[:0]
