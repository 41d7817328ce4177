"""What every token gives to every other through attention, and the way that it takes over the layers.

Data flow: ``Recording`` (queries, keys, values, mask of each layer) -> attention weights by the family's own formula,
values through the output projection -> contributions and their norms -> ``flow`` over many questions, and
``pictures.image_map`` of one.

The contribution of token j to token i by head h is a = A_ij (v_j W_O^h), the norm that tells how much it is
||sum_h a|| (2406.04236; Kobayashi et al. 2020). Contributions of all tokens and heads add up to what the output
projection puts out, its bias apart: that is verified whenever the recording holds the attention's output. It is what
comes before anything the block does to it: a norm behind the attention (Gemma 3), a gate (Mllama's cross-attention).
Weights of a token need not sum to one: where a family has attention sinks, the sink's share goes nowhere.

Shapes: H query heads, G key heads, Q queries (tokens that attend), K keys (attended to), E head size, D hidden size,
N layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mm.causal.effects.aggregate import profile
from lightning_mm.causal.effects.attention_knockout import Edge, edge
from lightning_mm.causal.interventions.activation_cache import Recording, record
from lightning_mm.causal.questions.question import Asked
from lightning_mm.core.errors import UserError
from lightning_mm.core.estimate import Estimate
from lightning_mm.models.attention.interception import repeated
from lightning_mm.models.handle import MultimodalModel

FLOW = ("image->constraint", "constraint->last", "image->last", "question->last")

_KEYS = 64
"""Keys that are taken through the output projection at a time: H * D numbers each."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Of the output's norm: an output projection that is not the last thing to happen is wrong by far more."""


@dataclass(frozen=True, eq=False)
class Norms:
    """How much tokens give.

    Args:
        tokens: (Q, K) norm of the sum over heads.
        heads: (H, Q, K) norm of each head's part.
        visible: (Q, K) whether the query sees the key.
    """

    tokens: Tensor
    heads: Tensor
    visible: Tensor


@torch.no_grad()
def contributions(
    mm: MultimodalModel, recording: Recording, layer: int, queries: Tensor, by_head: bool = False
) -> Tensor:
    """The contributions themselves.

    Args:
        mm: The plain model; adapters and quantised weights may be in it.
        recording: Of one question.
        layer: Decoder block.
        queries: (Q,) positions of the tokens that attend.
        by_head: Keep heads apart.

    Returns:
        (Q, K, D), or (H, Q, K, D), float32.

    Raises:
        UserError: The layer has no attention, or its output is made of more than values and an output projection.
    """
    parts = _Parts.of(mm, recording, layer, queries)
    formula = "hqk,hkd->hqkd" if by_head else "hqk,hkd->qkd"
    chunks = [torch.einsum(formula, parts.weight[..., keys], moved) for keys, moved in parts.moved()]
    return torch.cat(chunks, -2)


@torch.no_grad()
def contribution_norms(mm: MultimodalModel, recording: Recording, layer: int, queries: Tensor) -> Norms:
    """Norms of contributions, without holding the contributions; arguments and errors as ``contributions``."""
    parts = _Parts.of(mm, recording, layer, queries)
    tokens, heads = [], []
    for keys, moved_HkD in parts.moved():
        weight_HQk = parts.weight[..., keys]
        tokens.append(torch.einsum("hqk,hkd->qkd", weight_HQk, moved_HkD).norm(dim=-1))
        heads.append(weight_HQk * moved_HkD.norm(dim=-1)[:, None])
    return Norms(torch.cat(tokens, -1), torch.cat(heads, -1), parts.visible)


@torch.no_grad()
def output_map(module: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """What a linear module does, as float32 (width, D) matrix and (D,) bias.

    Modules that are more than a plain linear one (adapters, quantised weights) are asked: f(one-hot) - f(0).
    """
    if type(module) is nn.Linear:
        bias = module.weight.new_zeros(module.out_features) if module.bias is None else module.bias
        return module.weight.float().T, bias.float()
    bias_D = module(like.new_zeros(1, width))[0]
    rows = [module(part) - bias_D for part in torch.eye(width, dtype=like.dtype, device=like.device).split(512)]
    return torch.cat(rows).float(), bias_D.float()


def shares(
    mm: MultimodalModel, recording: Recording, asked: Asked, names: Sequence[str] = FLOW
) -> tuple[Tensor, Tensor]:
    """Of all that reaches the targets of an edge in a layer, the share that comes from its sources.

    The share of target i is sum over sources j of ||sum_h a_ji||, over the same sum for all tokens j; the mean over the
    targets is taken. In a layer that attends to the picture's own states, all keys are the picture.

    Args:
        mm: The plain model.
        recording: The question's run.
        asked: The question.
        names: Edges.

    Returns:
        (edges, N) shares, and what they would be if each visible token gave the same; NaN where the question has no
        such tokens, or the layer no attention.
    """
    edges = [edge(asked, name) for name in names]
    queries = torch.cat([each.targets for each in edges if each] or [torch.zeros(0, dtype=torch.long)]).unique()
    found = torch.full((2, len(names), mm.layout.num_layers), torch.nan, dtype=torch.float64)
    for layer in recording.calls if len(queries) else ():
        norms = contribution_norms(mm, recording, layer, queries)
        is_own = norms.tokens.shape[1] == recording.length
        for number, each in enumerate(edges):
            if each:
                rows = torch.searchsorted(queries, each.targets)
                for kind, amount_QK in enumerate((norms.tokens, norms.visible)):
                    found[kind, number, layer] = _share(amount_QK[rows.to(amount_QK.device)], each, is_own)
    return found[0], found[1]


def flow(
    mm: MultimodalModel, asked: Sequence[Asked], names: Sequence[str] = FLOW
) -> Iterator[tuple[str, list[Estimate]]]:
    """Edge and one Estimate per layer: the mean over questions of ``shares``; chance: all visible tokens give alike.

    Args:
        mm: The plain model in eval mode.
        asked: The questions.
        names: Edges.
    """
    found = []
    for one in asked:
        # One at a time: a recording of a large model is large.
        recording = record(mm, one.inputs, sites=("attention",))
        found.append(torch.stack(shares(mm, recording, one, names)))
    questions = [one.question for one in asked]
    for number, name in enumerate(names if found else ()):
        share_QN, null_QN = torch.stack([each[:, number] for each in found], 1)
        yield name, profile(share_QN, questions, f"no question has tokens for {name}, or no attention here", null_QN)


@dataclass(frozen=True, eq=False)
class _Parts:
    """One layer's attention of one row, taken apart.

    Args:
        weight: (H, Q, K).
        value: (H, K, E).
        out: (H, E, D) output projection.
        visible: (Q, K).
    """

    weight: Tensor
    value: Tensor
    out: Tensor
    visible: Tensor

    @classmethod
    def of(cls, mm: MultimodalModel, recording: Recording, layer: int, queries: Tensor) -> "_Parts":
        name = mm.layout.blocks[layer].o_proj
        if layer not in recording.calls:
            raise _cannot(layer, "it mixes tokens by other means than attention, or not at all")
        if name is None:
            raise _cannot(layer, "it has no attention with an output projection of its own")
        call = recording.calls[layer]
        assert len(call.query) == 1, "a recording of one question"
        rows = queries.to(call.query.device)
        mask = call.mask
        if mask is not None:
            mask = mask.expand(*mask.shape[:-2], call.query.shape[2], -1)[..., rows, :]
        call = call.changed(query=call.query[:, :, rows], mask=mask)
        weight_HQK = call.explicit()[1][0].float()
        value_HKE = repeated(call.value, call.query)[0].float()
        num_heads, num_keys, size = value_HKE.shape
        out, bias_D = output_map(mm.model.get_submodule(name), num_heads * size, call.value)
        visible_QK = torch.ones(len(rows), num_keys, dtype=torch.bool, device=rows.device)
        if mask is not None:
            visible_QK = (mask > torch.finfo(mask.dtype).min / 2).flatten(0, -3).any(0)
        parts = cls(weight_HQK, value_HKE, out.unflatten(0, (num_heads, size)), visible_QK)
        if ("attention", layer) in recording.values:
            parts._verify(recording.values["attention", layer][0, rows], bias_D, layer)
        return parts

    def moved(self) -> Iterator[tuple[slice, Tensor]]:
        """Some keys at a time, and (H, k, D) what each would give with weight 1."""
        for first in range(0, self.value.shape[1], _KEYS):
            keys = slice(first, first + _KEYS)
            yield keys, self.value[:, keys] @ self.out

    def _verify(self, put_out_QD: Tensor, bias_D: Tensor, layer: int) -> None:
        total_QD = torch.einsum("hqe,hed->qd", self.weight @ self.value, self.out) + bias_D
        error = float((total_QD - put_out_QD.float()).norm() / put_out_QD.float().norm().clamp_min(1e-12))
        if not error <= _TOLERANCE[put_out_QD.dtype]:
            raise _cannot(layer, f"contributions miss what it puts out by {error:.2g} of its size")


def _share(amount_TK: Tensor, way: Edge, is_own: bool) -> float:
    """Mean over targets of the sources' part of each row."""
    amount_TK = amount_TK.double()
    from_T = amount_TK[:, way.sources.to(amount_TK.device)].sum(1) if is_own else amount_TK.sum(1) * way.of_picture
    return float((from_T / amount_TK.sum(1)).mean())


def _cannot(layer: int, why: str) -> UserError:
    return UserError(
        f"The attention of layer {layer} cannot be split into contributions.",
        f"{why[0].upper()}{why[1:]}.",
        "Choose another layer; where an intervention changed the attention's output, record without it.",
    )
