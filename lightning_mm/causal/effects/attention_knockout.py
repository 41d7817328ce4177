"""Attention knockout: the effect on the answer of cutting attention between token classes in a window of layers.

Two kinds that are not equivalent:
``pre``: scores are masked before the softmax, so the remaining weights grow (Geva et al. 2023, arXiv:2304.14767).
``post``: weights are zeroed after the softmax and not renormalized (Serra et al. 2024, arXiv:2412.06646).
A token never loses attention to itself, so no row is masked completely.

Data flow: ``EncodedQuestion`` + name such as ``image->question`` -> ``AttentionEdge`` -> ``Knockout`` (an attention
function) -> ``knock_out`` (full forward passes) or ``knockout_logits`` (only what can differ) -> ``knockout_curves``.

Shapes: B rows, H query heads, Q queries, K keys, T targets (tokens that attend), S sources (attended to), E head size,
R rows of queries with a cut, L tokens, V vocabulary size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.causal.interventions.partial_forward import PartialForward
from lightning_mm.causal.questions.question import EncodedQuestion
from lightning_mm.core.errors import UserError
from lightning_mm.models.attention.interception import AttentionCall, attention_through, repeat_kv
from lightning_mm.models.handle import MultimodalModel

EDGE_CLASSES = ("image", "image_early", "image_late", "question", "constraint", "last")


@dataclass(frozen=True, eq=False)
class AttentionEdge:
    """Attention from some tokens to others.

    Args:
        name: ``source->target``, for tables and error messages.
        targets: (T,) positions of the tokens that attend.
        sources: (S,) positions of the tokens that are attended to.
        is_image: Whether the sources are the image; they are then all keys of a cross-attention layer, too.
    """

    name: str
    targets: Tensor
    sources: Tensor
    is_image: bool = False

    def __bool__(self) -> bool:
        """Whether the edge has both sources and targets."""
        return len(self.targets) > 0 and len(self.sources) > 0


def attention_edge(encoded: EncodedQuestion, name: str) -> AttentionEdge:
    """An edge of one question, by name.

    Args:
        encoded: The question.
        name: ``source->target``, both of ``EDGE_CLASSES``; ``question`` includes the constraint. An end that the
            question does not have (no image, no constraint) is empty.

    Raises:
        UserError: There is no such class, or the edge is ``last->last``: a token always attends to itself.
    """
    check_edge(name)
    source, _, target = name.partition("->")
    return AttentionEdge(name, _tokens(encoded, target), _tokens(encoded, source), source == "image")


def check_edge(name: str) -> None:
    """Raise a ``UserError`` if there is no edge of this name."""
    source, _, target = name.partition("->")
    if source not in EDGE_CLASSES or target not in EDGE_CLASSES or (source, target) == ("last", "last"):
        raise UserError(
            f"There is no edge {name!r}.",
            "A token never loses sight of itself." if name == "last->last" else "Edges are named source->target.",
            f"Give two of {', '.join(EDGE_CLASSES)}, image->question for example.",
        )


def _tokens(encoded: EncodedQuestion, name: str) -> Tensor:
    if name == "last":
        return torch.tensor([encoded.length - 1])
    if name in ("image_early", "image_late"):
        return torch.tensor([i for i, each in enumerate(encoded.classes) if each == name], dtype=torch.long)
    return {"image": encoded.image, "question": encoded.text, "constraint": encoded.constraint}[name].unique()


KnockoutKind = Literal["pre", "post"]

_KERNELS = ("eager", "sdpa")
"""Attention implementations that take a mask per query; FlashAttention ignores it."""


class Knockout:
    """An attention function with some edges cut; all other layers and tokens are computed as usual.

    Args:
        edges: Edges to cut; empty ones are ignored.
        layers: Indices of the layers to cut them in.
        kind: ``pre`` or ``post`` the softmax, see the module docstring.
        length: L, if calls may hold the last queries only (``PartialForward``); None: calls hold all queries.
    """

    def __init__(
        self, edges: Sequence[AttentionEdge], layers: Sequence[int], kind: KnockoutKind, length: int | None = None
    ) -> None:
        self.edges, self.layers, self.kind, self.length = [e for e in edges if e], frozenset(layers), kind, length
        self.has_cut = not (self.edges and self.layers)
        """Whether any attention row was changed, or there was nothing to cut."""

    def __call__(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        if call.layer not in self.layers or not self.edges:
            return call.compute()
        if call.kernel not in _KERNELS:
            raise UserError(
                f"Attention cannot be knocked out under {call.kernel}.",
                "This kernel takes no mask that differs from token to token.",
                "Load the model with eager or sdpa attention.",
            )
        seen_QK, cut_QK = self._masks(call)
        if not cut_QK.any():
            return call.compute()
        self.has_cut = True
        return _mask_scores(call, seen_QK, cut_QK) if self.kind == "pre" else _zero_weights(call, cut_QK)

    def verify(self) -> None:
        """Raise a ``UserError`` if the run did not change any attention row."""
        if not self.has_cut:
            names = ", ".join(each.name for each in self.edges)
            raise UserError(
                f"Knocking out {names} changed nothing.",
                f"In layers {sorted(self.layers)} no target sees a source: they come earlier, or are out of reach.",
                "Choose sources that stand before the targets, and layers that attend that far.",
            )

    def cuts(self, call: AttentionCall) -> bool:
        """Whether the edges change this call."""
        return call.layer in self.layers and bool(self._masks(call)[1].any())

    def _masks(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(Q, K) keys that a query may attend to, and those of them that are cut."""
        num_queries, num_keys = call.query.shape[2], call.key.shape[2]
        length = self.length or num_queries
        start, device = length - num_queries, call.query.device
        cut_QK = torch.zeros(num_queries, num_keys, dtype=torch.bool, device=device)
        for each in self.edges:
            assert int(each.targets.min()) >= start, "targets before the first query cannot be cut"
            targets, sources = each.targets.to(device) - start, each.sources.to(device)
            if num_keys == length:
                cut_QK[targets[:, None], sources] = True
            elif each.is_image:
                cut_QK[targets] = True
        if num_keys == length:
            cut_QK.diagonal(start).fill_(False)
        seen_QK = torch.ones_like(cut_QK)
        if call.mask is not None:
            seen_QK = (call.mask > torch.finfo(call.mask.dtype).min / 2).flatten(0, -3).any(0).expand_as(cut_QK)
        return seen_QK, cut_QK & seen_QK


@contextmanager
def knock_out(
    mm: MultimodalModel, edges: Sequence[AttentionEdge], layers: Sequence[int], kind: KnockoutKind
) -> Iterator[None]:
    """Context in which full forward passes of the model (no KV cache, all tokens) run with the edges cut.

    Cannot be combined with ``cache_activations``, which intercepts attention itself.

    Args:
        mm: The unwrapped model; may have adapters and quantized weights.
        edges: Edges to cut; none: no change.
        layers: Indices of the layers to cut them in; none: no change.
        kind: ``pre`` or ``post`` the softmax.

    Raises:
        UserError: The attention implementation takes no masks; a token would attend to nothing; or, when the context
            ends, no attention row was changed.
    """
    knockout = Knockout(edges, layers, kind)
    with attention_through(mm, knockout):
        yield
    knockout.verify()


def knockout_logits(
    partial_forward: PartialForward, edges: Sequence[AttentionEdge], layers: Sequence[int], kind: KnockoutKind
) -> Tensor:
    """(V,) float32 last-token logits with the edges cut, computed from the first layer and token that can differ.

    Args:
        partial_forward: Partial forward of the clean run.
        edges: Edges to cut.
        layers: Indices of the layers to cut them in.
        kind: ``pre`` or ``post`` the softmax.

    Raises:
        UserError: As for ``knock_out``.
    """
    knockout = Knockout(edges, layers, kind, partial_forward.base.length)
    if not knockout.edges or not knockout.layers:
        return partial_forward.base.logits[0]
    start = partial_forward.restart_position(min(int(each.targets.min()) for each in knockout.edges))
    logits = partial_forward.logits(layer=min(knockout.layers), start=start, attend=knockout)
    knockout.verify()
    return logits[0]


def _mask_scores(call: AttentionCall, seen_QK: Tensor, cut_QK: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cut before the softmax, in the mask of the model's own attention implementation."""
    if (seen_QK.any(1) & ~(seen_QK & ~cut_QK).any(1)).any():
        raise UserError(
            f"Layer {call.layer} would attend to nothing.",
            "All its keys are the picture's own states, and they are what is to be cut.",
            "Cut behind the softmax there (post), or leave this layer out.",
        )
    mask = call.query.new_zeros(1, 1, *cut_QK.shape) if call.mask is None else call.mask
    return call.changed(mask=mask.masked_fill(cut_QK, torch.finfo(mask.dtype).min)).compute()


def _zero_weights(call: AttentionCall, cut_QK: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cut after the softmax: the model's own output minus A_ij v_j of the cut pairs."""
    out_BQHE, weight = call.compute()
    rows = cut_QK.any(1).nonzero().flatten()
    mask = call.mask
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], *cut_QK.shape)[..., rows, :]
    explicit_BHRK = call.changed(query=call.query[:, :, rows], mask=mask).explicit()[1]
    cut_BHRE = (explicit_BHRK * cut_QK[rows]) @ repeat_kv(call.value, call.query)
    out_BQHE = out_BQHE.index_add(1, rows, cut_BHRE.transpose(1, 2).to(out_BQHE.dtype), alpha=-1)
    return out_BQHE, None if weight is None else weight.masked_fill(cut_QK, 0)
