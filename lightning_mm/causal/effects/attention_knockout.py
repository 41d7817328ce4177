"""Attention knockout: what the answer loses when some tokens cannot attend to some others in a window of layers.

Data flow: ``Edge``s -> ``Knockout``, which answers for attention -> ``knocked_out`` (whole runs) or ``knocked_logits``
(only what can differ is computed) -> ``knockout_curves`` over many questions.

Two interventions that are not the same:
``pre``: the scores are masked before the softmax, so the token attends more to what it still sees (Geva et al. 2023).
``post``: the weights are zeroed behind the softmax and nothing takes their place (2412.06646).
A token never loses sight of itself, so no row is ever masked completely.

Shapes: B rows, H query heads, Q queries, K keys, E head size, L tokens, V vocabulary.

Which tokens give to which through attention: the ways that an answer can take, by the names of token classes.

Data flow: ``Asked`` + a name such as ``image->question`` -> ``Edge`` -> measured by ``attention``, cut by ``knockout``.

Shapes: T targets (tokens that attend), S sources (tokens that are attended to).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.causal.interventions.partial_forward import Replay
from lightning_mm.causal.questions.question import Asked
from lightning_mm.core.errors import UserError
from lightning_mm.models.attention.interception import AttentionCall, attention_through, repeated
from lightning_mm.models.handle import MultimodalModel

CLASSES = ("image", "question", "constraint", "last")


@dataclass(frozen=True, eq=False)
class Edge:
    """From some tokens to others.

    Args:
        name: As told in tables and errors.
        targets: (T,) positions of the tokens that attend.
        sources: (S,) positions of the tokens that they attend to.
        of_picture: Whether the sources are the picture: then they are also every key of a layer that attends to the
            picture's own states instead of the tokens (cross-attention).
    """

    name: str
    targets: Tensor
    sources: Tensor
    of_picture: bool = False

    def __bool__(self) -> bool:
        """Whether there is anything at both ends."""
        return len(self.targets) > 0 and len(self.sources) > 0


def edge(asked: Asked, name: str) -> Edge:
    """An edge of one question.

    Args:
        asked: The question.
        name: ``source->target``, both of ``CLASSES``; ``question`` is all of its tokens, the constraint's among them.
            An end that the question does not have (no picture, no constraint) is empty.

    Raises:
        UserError: There is no such class, or the edge is ``last->last``: a token always sees itself.
    """
    check(name)
    source, _, target = name.partition("->")
    return Edge(name, _tokens(asked, target), _tokens(asked, source), source == "image")


def check(name: str) -> None:
    """Raises UserError if there is no such edge."""
    source, _, target = name.partition("->")
    if source not in CLASSES or target not in CLASSES or (source, target) == ("last", "last"):
        raise UserError(
            f"There is no edge {name!r}.",
            "A token never loses sight of itself." if name == "last->last" else "Edges are named source->target.",
            f"Give two of {', '.join(CLASSES)}, image->question for example.",
        )


def _tokens(asked: Asked, name: str) -> Tensor:
    if name == "last":
        return torch.tensor([asked.length - 1])
    return {"image": asked.image, "question": asked.text, "constraint": asked.constraint}[name].unique()


Kind = Literal["pre", "post"]

_KERNELS = ("eager", "sdpa")
"""Those that take a mask which differs from query to query; FlashAttention ignores it."""


class Knockout:
    """Answers for attention with some edges cut; every other layer and token is computed as ever.

    Args:
        edges: What to cut.
        layers: Where.
        kind: ``pre`` or ``post`` the softmax.
        length: L, where calls may hold the last queries only (``Replay``); None: they hold all.
    """

    def __init__(self, edges: Sequence[Edge], layers: Sequence[int], kind: Kind, length: int | None = None) -> None:
        self.edges, self.layers, self.kind, self.length = [e for e in edges if e], frozenset(layers), kind, length
        self.took = not (self.edges and self.layers)
        """Whether anything was cut, or nothing was asked for."""

    def __call__(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        if call.layer not in self.layers or not self.edges:
            return call.compute()
        if call.kernel not in _KERNELS:
            raise UserError(
                f"Attention cannot be knocked out under {call.kernel}.",
                "This kernel takes no mask that differs from token to token.",
                "Load the model with eager or sdpa attention.",
            )
        seen_QK, cut_QK = self._ends(call)
        if not cut_QK.any():
            return call.compute()
        self.took = True
        return _masked(call, seen_QK, cut_QK) if self.kind == "pre" else _zeroed(call, cut_QK)

    def verify(self) -> None:
        """Raises UserError if the run came by without one attention row changing."""
        if not self.took:
            names = ", ".join(each.name for each in self.edges)
            raise UserError(
                f"Knocking out {names} changed nothing.",
                f"In layers {sorted(self.layers)} no target sees a source: they come earlier, or are out of reach.",
                "Choose sources that stand before the targets, and layers that attend that far.",
            )

    def cuts(self, call: AttentionCall) -> bool:
        """Whether this call would change."""
        return call.layer in self.layers and bool(self._ends(call)[1].any())

    def _ends(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(Q, K) which keys a query sees, and which of these it is to lose."""
        num_queries, num_keys = call.query.shape[2], call.key.shape[2]
        length = self.length or num_queries
        start, device = length - num_queries, call.query.device
        cut_QK = torch.zeros(num_queries, num_keys, dtype=torch.bool, device=device)
        for each in self.edges:
            assert int(each.targets.min()) >= start, "an earlier target would be left as it is"
            targets, sources = each.targets.to(device) - start, each.sources.to(device)
            if num_keys == length:
                cut_QK[targets[:, None], sources] = True
            elif each.of_picture:
                cut_QK[targets] = True
        if num_keys == length:
            cut_QK.diagonal(start).fill_(False)
        seen_QK = torch.ones_like(cut_QK)
        if call.mask is not None:
            seen_QK = (call.mask > torch.finfo(call.mask.dtype).min / 2).flatten(0, -3).any(0).expand_as(cut_QK)
        return seen_QK, cut_QK & seen_QK


@contextmanager
def knocked_out(mm: MultimodalModel, edges: Sequence[Edge], layers: Sequence[int], kind: Kind) -> Iterator[None]:
    """While active, whole runs of the model (no cache, all tokens) compute with the edges cut.

    No edge or no layer is no change. It cannot be combined with ``record``, which answers for attention itself.

    Args:
        mm: The plain model; adapters and quantised weights may be in it.
        edges: What to cut.
        layers: Where.
        kind: ``pre`` or ``post`` the softmax.

    Raises:
        UserError: The kernel takes no masks; a token would see nothing at all; or, when the context ends, not one
            attention row was changed.
    """
    knockout = Knockout(edges, layers, kind)
    with attention_through(mm, knockout):
        yield
    knockout.verify()


def knocked_logits(replay: Replay, edges: Sequence[Edge], layers: Sequence[int], kind: Kind) -> Tensor:
    """(V,) float32 last-token logits with the edges cut, computed from the first layer and token that can differ.

    Args:
        replay: Of the clean run.
        edges: What to cut.
        layers: Where.
        kind: ``pre`` or ``post`` the softmax.

    Raises:
        UserError: As ``knocked_out``.
    """
    knockout = Knockout(edges, layers, kind, replay.base.length)
    if not knockout.edges or not knockout.layers:
        return replay.base.logits[0]
    start = replay.start_for(min(int(each.targets.min()) for each in knockout.edges))
    logits = replay.logits(layer=min(knockout.layers), start=start, attend=knockout)
    knockout.verify()
    return logits[0]


def _masked(call: AttentionCall, seen_QK: Tensor, cut_QK: Tensor) -> tuple[Tensor, Tensor | None]:
    """Before the softmax, by the model's own kernel."""
    if (seen_QK.any(1) & ~(seen_QK & ~cut_QK).any(1)).any():
        raise UserError(
            f"Layer {call.layer} would attend to nothing.",
            "All its keys are the picture's own states, and they are what is to be cut.",
            "Cut behind the softmax there (post), or leave this layer out.",
        )
    mask = call.query.new_zeros(1, 1, *cut_QK.shape) if call.mask is None else call.mask
    return call.changed(mask=mask.masked_fill(cut_QK, torch.finfo(mask.dtype).min)).compute()


def _zeroed(call: AttentionCall, cut_QK: Tensor) -> tuple[Tensor, Tensor | None]:
    """Behind the softmax: the model's own output, less A_ij v_j of what is cut."""
    out_BQHE, weight = call.compute()
    rows = cut_QK.any(1).nonzero().flatten()
    mask = call.mask
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], *cut_QK.shape)[..., rows, :]
    explicit_BHRK = call.changed(query=call.query[:, :, rows], mask=mask).explicit()[1]
    lost_BHRE = (explicit_BHRK * cut_QK[rows]) @ repeated(call.value, call.query)
    out_BQHE = out_BQHE.index_add(1, rows, lost_BHRE.transpose(1, 2).to(out_BQHE.dtype), alpha=-1)
    return out_BQHE, None if weight is None else weight.masked_fill(cut_QK, 0)
