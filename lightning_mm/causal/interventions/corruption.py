"""Corrupt inputs of a question: as long as the clean ones, but without what its answer hangs on.

Data flow: ``Asked`` (and others, which lend words and pictures) -> ``corrupted`` -> ``Corrupt``: inputs, and a context
in which the model must run on them.

    token      each of the constraint's tokens becomes the first token of one word, "Paris" (2406.04236)
    symmetric  each place of the constraint becomes another question's constraint of as many tokens (2406.16320)
    image      the picture becomes another question's, of as many tokens; the text stays
    gaussian   noise is added to the embeddings of the constraint's tokens: 3 times their standard deviation
               (2202.05262; far from anything that the model was trained on)
    grey       the things in the question's boxes become grey; the text stays

What would change nothing is refused: "this flag" put for "this flag", a picture put for itself.

Shapes: L tokens, P positions, D hidden size.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_mm.causal.questions.image_regions import encoded, greyed
from lightning_mm.causal.questions.question import Asked, on_device
from lightning_mm.core.errors import UserError
from lightning_mm.data.sample import Rejection
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.processor import Processing

CorruptionKind = Literal["token", "symmetric", "image", "gaussian", "grey"]
KINDS: tuple[CorruptionKind, ...] = get_args(CorruptionKind)
NOISE = 3.0
"""Standard deviations (2202.05262)."""
_NOTHING = "corruption changes nothing"
_NO_CONSTRAINT = "no constraint in the text: this corruption overwrites one"


@dataclass(frozen=True, eq=False)
class Corrupt:
    """A corrupt question.

    Args:
        asked: The clean one.
        kind: How it is corrupted.
        inputs: Of one row and L tokens, on the device of the clean ones; to be used inside ``applied``.
        positions: (P,) tokens whose embeddings differ; the picture's, all of them, where the picture does.
        donor: Id of the question that lent words or picture; empty where none did.
        noise: (P, D) what is added to the embeddings at ``positions``, or None.
    """

    asked: Asked
    kind: CorruptionKind
    inputs: dict[str, Tensor]
    positions: Tensor
    donor: str = ""
    noise: Tensor | None = None

    @contextmanager
    def applied(self, mm: MultimodalModel) -> Iterator[None]:
        """While active, the model embeds ``inputs`` as the corruption has it; what has only other inputs needs no help.

        Raises:
            UserError: When the context ends, and noise was never added.
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
                f"The model never embedded {self.asked.length} tokens by its token embedding.",
                "Run the model on the corrupt inputs inside the context, or choose another corruption.",
            )

    def _adding(self, took: list[bool]) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, __: Any, output_BLD: Tensor) -> Tensor | None:
            if output_BLD.ndim != 3 or output_BLD.shape[1] != self.asked.length:
                return None  # embedded apart: single tokens that the model looks up
            assert self.noise is not None
            took.append(True)
            noisy = output_BLD.clone()
            noisy[:, self.positions.to(noisy.device)] += self.noise.to(noisy)
            return noisy

        return hook


def corrupted(
    asked: Asked,
    kind: CorruptionKind,
    others: Sequence[Asked],
    processing: Processing,
    mm: MultimodalModel,
    seed: int = 0,
    word: str = "Paris",
) -> Corrupt | Rejection:
    """Corrupt a question, or say why it cannot be.

    Args:
        asked: The question.
        kind: How.
        others: Questions that may lend their words or picture, asked in the same way; itself among them does no harm.
            Those with another answer are preferred, and of them those of the same kind.
        processing: The model's processor.
        mm: The plain model; only its embedding is used.
        seed: Of the noise and of the choice of a lender; the question's id goes in too, so order does not matter.
        word: What ``token`` writes.

    Raises:
        UserError: No such kind.
    """
    if kind not in KINDS:
        raise UserError(f"There is no corruption {kind!r}.", "It is not one of ours.", f"Use {', '.join(KINDS)}.")
    if kind in ("token", "symmetric", "gaussian") and not len(asked.constraint):
        return Rejection(asked.question.id, _NO_CONSTRAINT)
    chance = random.Random(f"{seed}:{kind}:{asked.question.id}")
    if kind == "token":
        ids = asked.inputs["input_ids"].clone()
        ids[:, asked.constraint] = first_token(processing, word)
        return _reworded(asked, kind, ids)
    if kind == "symmetric":
        return _symmetric(asked, others, chance)
    if kind == "gaussian":
        return _noisy(asked, mm, chance.getrandbits(63))
    return _greyed(asked, processing) if kind == "grey" else _swapped(asked, others, processing, chance)


def first_token(processing: Processing, word: str) -> int:
    """The token that a word begins with in the middle of a sentence, where most tokenizers join it to its blank."""
    before = "the "
    told = processing.processor.tokenizer(before + word, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(told["input_ids"], told["offset_mapping"], strict=True)
    found = next((token for token, (start, end) in pairs if end > max(start, len(before))), None)
    if found is None:
        raise UserError(f"The word {word!r} has no token.", "The tokenizer drops it.", "Give another word.")
    return int(found)


def _reworded(asked: Asked, kind: CorruptionKind, ids_1L: Tensor, donor: str = "") -> Corrupt | Rejection:
    positions = (ids_1L != asked.inputs["input_ids"])[0].nonzero().flatten().cpu()
    if not len(positions):
        return Rejection(asked.question.id, f"{_NOTHING}: the constraint becomes what it is")
    return Corrupt(asked, kind, {**asked.inputs, "input_ids": ids_1L}, positions, donor)


def _symmetric(asked: Asked, others: Sequence[Asked], chance: random.Random) -> Corrupt | Rejection:
    """Each place of the constraint gets a lender's words of as many tokens; one lender for all places."""
    for other in _ranked(asked, others, chance):
        lent = {len(span): other.inputs["input_ids"][0, span] for span in reversed(other.spans)}
        if all(len(span) in lent for span in asked.spans):
            ids = asked.inputs["input_ids"].clone()
            for span in asked.spans:
                ids[0, span] = lent[len(span)].to(ids.device)
            made = _reworded(asked, "symmetric", ids, other.question.id)
            if isinstance(made, Corrupt):
                return made
    lengths = ", ".join(str(len(span)) for span in asked.spans)
    return Rejection(asked.question.id, f"no lender: no other question has another constraint of {lengths} tokens")


def _noisy(asked: Asked, mm: MultimodalModel, seed: int) -> Corrupt | Rejection:
    positions = asked.constraint.unique()
    with torch.no_grad():
        ids = on_device(mm, asked.inputs)["input_ids"][0, positions]
        embedded_PD = mm.model.get_submodule(mm.layout.embedding)(ids).float().cpu()
    noise = torch.randn(embedded_PD.shape, generator=torch.Generator().manual_seed(seed))
    noise = NOISE * embedded_PD.std() * noise
    if not noise.any():
        return Rejection(asked.question.id, f"{_NOTHING}: the embeddings there have no spread")
    return Corrupt(asked, "gaussian", dict(asked.inputs), positions, noise=noise)


def _swapped(
    asked: Asked, others: Sequence[Asked], processing: Processing, chance: random.Random
) -> Corrupt | Rejection:
    """Another question's picture."""
    if not len(asked.image):
        return Rejection(asked.question.id, "no picture: this corruption puts another in its place")
    for other in _ranked(asked, others, chance):
        if inputs := _with_picture_of(asked, other.inputs, processing):
            return Corrupt(asked, "image", inputs, asked.image, other.question.id)
    return Rejection(asked.question.id, f"no lender: no other picture of {len(asked.image)} tokens that differs")


def _greyed(asked: Asked, processing: Processing) -> Corrupt | Rejection:
    picture = greyed(asked.question)
    if isinstance(picture, Rejection):
        return picture
    inputs = _with_picture_of(asked, encoded(processing, picture), processing)
    if inputs is None:
        return Rejection(asked.question.id, f"{_NOTHING}: the boxes are grey already")
    return Corrupt(asked, "grey", inputs, asked.image)


def _ranked(asked: Asked, others: Sequence[Asked], chance: random.Random) -> list[Asked]:
    """By chance, but those with another answer first, and of them those of the same kind."""
    answer, kind = asked.question.answer, asked.question.kind
    order = sorted(others, key=lambda each: each.question.id)
    chance.shuffle(order)
    return sorted(order, key=lambda each: (each.question.answer == answer, each.question.kind != kind))


def _with_picture_of(asked: Asked, other: Mapping[str, Tensor], processing: Processing) -> dict[str, Tensor] | None:
    """The question's inputs with the picture of another row; None where it does not fit, or is the same.

    It fits where its tokens, and those that name its tiles, are the same row of tokens.
    """
    own, theirs = (_parted(inputs) for inputs in (asked.inputs, other))
    same_tokens = torch.equal(*(_tokens_of_picture(x["input_ids"], processing) for x in (asked.inputs, other)))
    # Attention to pictures from outside the row of tokens: which tiles there are must be the same, too.
    masks = [[x.amax(1).cpu() for _, x in sorted(text.items()) if x.ndim > 2] for text, _ in (own, theirs)]
    if not same_tokens or own[1].keys() != theirs[1].keys() or not all(map(torch.equal, *masks)):
        return None
    device = asked.inputs["input_ids"].device
    pictures = {name: tensor.to(device) for name, tensor in theirs[1].items()}
    if all(torch.equal(pictures[name], tensor) for name, tensor in own[1].items()):
        return None
    return {**asked.inputs, **pictures}


def _parted(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A row's inputs that go with its tokens, (1, L, ...), and those that are its pictures."""
    row = inputs["input_ids"].shape
    text = {name: tensor for name, tensor in inputs.items() if tensor.shape[:2] == row}
    return text, {name: tensor for name, tensor in inputs.items() if name not in text}


def _tokens_of_picture(ids_1L: Tensor, processing: Processing) -> Tensor:
    """From the first token of the picture to the last."""
    ids = ids_1L[0].cpu()
    at = torch.isin(ids, torch.tensor(processing.image_token_ids)).nonzero().flatten()
    return ids[at[0] : at[-1] + 1] if len(at) else ids[:0]
