"""Attention contributions of tokens to each other, and the flow of information from the image to the answer.

The contribution of token j to token i through head h is a_ij = A_ij (v_j W_O^h); its size is the norm of the sum over
heads, ||sum_h a_ij|| (Kobayashi et al. 2020, arXiv:2004.10102; Basu et al. 2024, arXiv:2406.04236). Contributions of
all tokens and heads add up to the output of the output projection without its bias, which is verified whenever the
cache holds the attention's output. Later operations of the block are not included: a norm after attention (Gemma 3),
a gate (Mllama's cross-attention). Weights of a token need not sum to one: attention sinks take a part of them.

Data flow: ``ActivationCache`` (queries, keys, values, mask of each layer) -> attention weights by the model's own
formula, values times output projection -> contributions and their norms -> ``flow_curves`` over many questions,
``image_overlays.contribution_map`` of one.

Shapes: H query heads, Q queries (tokens that attend), K keys (attended to), T targets of an edge, E head size, D hidden
size, N layers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mm.causal.effects.aggregate import layer_means
from lightning_mm.causal.effects.attention_knockout import AttentionEdge, attention_edge
from lightning_mm.causal.interventions.activation_cache import ActivationCache, cache_activations
from lightning_mm.causal.questions.question import EncodedQuestion
from lightning_mm.core.errors import UserError
from lightning_mm.core.estimate import Estimate
from lightning_mm.models.attention.interception import repeat_kv
from lightning_mm.models.handle import MultimodalModel

FLOW_EDGES = ("image->constraint", "constraint->last", "image->last", "question->last")

_KEYS_PER_CHUNK = 64
"""Keys that are multiplied with the output projection at a time: H * D values each."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Tolerated error relative to the output's norm; a module that does more after the projection is off by far more."""


@dataclass(frozen=True, eq=False)
class ContributionNorms:
    """Norms of attention contributions.

    Args:
        tokens: (Q, K) norm of the contribution of each key to each query, summed over heads.
        heads: (H, Q, K) norm of each head's contribution.
        visible: (Q, K) bool, whether the query may attend to the key.
    """

    tokens: Tensor
    heads: Tensor
    visible: Tensor


@torch.no_grad()
def contributions(
    mm: MultimodalModel, cache: ActivationCache, layer: int, queries: Tensor, by_head: bool = False
) -> Tensor:
    """Contribution vectors of all keys to the given queries.

    Args:
        mm: The unwrapped model; may have adapters and quantized weights.
        cache: Activations of one question.
        layer: Index of the decoder block.
        queries: (Q,) positions of the tokens that attend.
        by_head: Whether to return heads separately instead of their sum.

    Returns:
        (Q, K, D), or (H, Q, K, D) by head, float32.

    Raises:
        UserError: The layer has no attention, or its output is not values times output projection.
    """
    parts = _AttentionParts.of(mm, cache, layer, queries)
    formula = "hqk,hkd->hqkd" if by_head else "hqk,hkd->qkd"
    chunks = [torch.einsum(formula, parts.weight[..., keys], projected) for keys, projected in parts.projected()]
    return torch.cat(chunks, -2)


@torch.no_grad()
def contribution_norms(mm: MultimodalModel, cache: ActivationCache, layer: int, queries: Tensor) -> ContributionNorms:
    """Norms of the contributions, computed in chunks of keys; arguments and errors as for ``contributions``."""
    parts = _AttentionParts.of(mm, cache, layer, queries)
    tokens, heads = [], []
    for keys, projected_HkD in parts.projected():
        weight_HQk = parts.weight[..., keys]
        tokens.append(torch.einsum("hqk,hkd->qkd", weight_HQk, projected_HkD).norm(dim=-1))
        heads.append(weight_HQk * projected_HkD.norm(dim=-1)[:, None])
    return ContributionNorms(torch.cat(tokens, -1), torch.cat(heads, -1), parts.visible)


@torch.no_grad()
def output_projection(module: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """A linear module as float32 (width, D) matrix and (D,) bias.

    Modules other than ``nn.Linear`` (adapters, quantized weights) are evaluated: f(one-hot) - f(0).

    Args:
        module: The module.
        width: Input size.
        like: A tensor of the module's input dtype and device.
    """
    if type(module) is nn.Linear:
        bias = module.weight.new_zeros(module.out_features) if module.bias is None else module.bias
        return module.weight.float().T, bias.float()
    bias_D = module(like.new_zeros(1, width))[0]
    rows = [module(part) - bias_D for part in torch.eye(width, dtype=like.dtype, device=like.device).split(512)]
    return torch.cat(rows).float(), bias_D.float()


def flow_shares(
    mm: MultimodalModel, cache: ActivationCache, encoded: EncodedQuestion, names: Sequence[str] = FLOW_EDGES
) -> tuple[Tensor, Tensor]:
    """Fraction of the attention contributions to an edge's targets that comes from its sources, by layer.

    For target i: the sum over sources j of ||sum_h a_ij||, divided by the same sum over all tokens j; averaged over the
    targets. In cross-attention layers all keys are the image.

    Args:
        mm: The unwrapped model.
        cache: Activations of the question.
        encoded: The question.
        names: Edges, such as ``image->last``.

    Returns:
        (edges, N) fractions, and (edges, N) fractions if all visible tokens contributed equally (the null); NaN if the
        question has no such tokens, or the layer no attention.
    """
    edges = [attention_edge(encoded, name) for name in names]
    queries = torch.cat([each.targets for each in edges if each] or [torch.zeros(0, dtype=torch.long)]).unique()
    shares = torch.full((2, len(names), mm.layout.num_layers), torch.nan, dtype=torch.float64)
    for layer in cache.attention_calls if len(queries) else ():
        norms = contribution_norms(mm, cache, layer, queries)
        is_own = norms.tokens.shape[1] == cache.length
        for number, each in enumerate(edges):
            if each:
                rows = torch.searchsorted(queries, each.targets)
                for kind, amount_QK in enumerate((norms.tokens, norms.visible)):
                    shares[kind, number, layer] = _source_share(amount_QK[rows.to(amount_QK.device)], each, is_own)
    return shares[0], shares[1]


def flow_curves(
    mm: MultimodalModel, encoded: Sequence[EncodedQuestion], names: Sequence[str] = FLOW_EDGES
) -> Iterator[tuple[str, list[Estimate]]]:
    """Yields edge and one Estimate per layer: the mean of ``flow_shares``; null: visible tokens contribute equally.

    Args:
        mm: The unwrapped model in eval mode.
        encoded: The questions.
        names: Edges, such as ``image->last``.
    """
    shares = []
    for one in encoded:
        # One at a time: activations of a large model are large.
        cache = cache_activations(mm, one.inputs, sites=("attention",))
        shares.append(torch.stack(flow_shares(mm, cache, one, names)))
    questions = [one.question for one in encoded]
    for number, name in enumerate(names if shares else ()):
        share_QN, null_QN = torch.stack([each[:, number] for each in shares], 1)
        yield (
            name,
            layer_means(share_QN, questions, f"no question has tokens for {name}, or no attention here", null_QN),
        )


@dataclass(frozen=True, eq=False)
class _AttentionParts:
    """Attention of one layer and one row, split into weights, values and output projection.

    Args:
        weight: (H, Q, K) attention weights.
        value: (H, K, E) value vectors, repeated for every query head.
        out: (H, E, D) output projection by head.
        visible: (Q, K) bool, whether the query may attend to the key.
    """

    weight: Tensor
    value: Tensor
    out: Tensor
    visible: Tensor

    @classmethod
    def of(cls, mm: MultimodalModel, cache: ActivationCache, layer: int, queries: Tensor) -> "_AttentionParts":
        name = mm.layout.blocks[layer].o_proj
        if layer not in cache.attention_calls:
            raise _not_decomposable(layer, "it mixes tokens by other means than attention, or not at all")
        if name is None:
            raise _not_decomposable(layer, "it has no attention with an output projection of its own")
        call = cache.attention_calls[layer]
        assert len(call.query) == 1, "a cache of one question"
        rows = queries.to(call.query.device)
        mask = call.mask
        if mask is not None:
            mask = mask.expand(*mask.shape[:-2], call.query.shape[2], -1)[..., rows, :]
        call = call.changed(query=call.query[:, :, rows], mask=mask)
        weight_HQK = call.explicit()[1][0].float()
        value_HKE = repeat_kv(call.value, call.query)[0].float()
        num_heads, num_keys, size = value_HKE.shape
        out, bias_D = output_projection(mm.model.get_submodule(name), num_heads * size, call.value)
        visible_QK = torch.ones(len(rows), num_keys, dtype=torch.bool, device=rows.device)
        if mask is not None:
            visible_QK = (mask > torch.finfo(mask.dtype).min / 2).flatten(0, -3).any(0)
        parts = cls(weight_HQK, value_HKE, out.unflatten(0, (num_heads, size)), visible_QK)
        if ("attention", layer) in cache.values:
            parts._verify(cache.values["attention", layer][0, rows], bias_D, layer)
        return parts

    def projected(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields chunks of keys, and the (H, k, D) contribution of each key at weight 1."""
        for first in range(0, self.value.shape[1], _KEYS_PER_CHUNK):
            keys = slice(first, first + _KEYS_PER_CHUNK)
            yield keys, self.value[:, keys] @ self.out

    def _verify(self, output_QD: Tensor, bias_D: Tensor, layer: int) -> None:
        total_QD = torch.einsum("hqe,hed->qd", self.weight @ self.value, self.out) + bias_D
        error = float((total_QD - output_QD.float()).norm() / output_QD.float().norm().clamp_min(1e-12))
        if not error <= _TOLERANCE[output_QD.dtype]:
            raise _not_decomposable(layer, f"contributions miss what it puts out by {error:.2g} of its size")


def _source_share(amount_TK: Tensor, edge: AttentionEdge, is_own: bool) -> float:
    """Mean over targets of the sources' fraction of each row."""
    if not is_own and edge.name.startswith("image_"):
        return math.nan  # cross-attention does not tell which of its keys are late
    amount_TK = amount_TK.double()
    from_T = amount_TK[:, edge.sources.to(amount_TK.device)].sum(1) if is_own else amount_TK.sum(1) * edge.is_image
    return float((from_T / amount_TK.sum(1)).mean())


def _not_decomposable(layer: int, why: str) -> UserError:
    return UserError(
        f"The attention of layer {layer} cannot be split into contributions.",
        f"{why[0].upper()}{why[1:]}.",
        "Choose another layer; where an intervention changed the attention's output, record without it.",
    )
