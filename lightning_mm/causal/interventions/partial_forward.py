"""Recomputes a cached run from the middle: from some layer and token on, many variants at a time.

Data flow: ``ActivationCache`` of the base run + variants (interventions, replaced hidden states) -> only the blocks and
tokens that can differ are computed, with the cached keys and values of earlier tokens -> logits of each variant.

Exact if attention is causal: earlier tokens, image tokens above all, do not depend on later ones. Where tokens attend
to later ones, all tokens that attend to a changed one are recomputed, up to the whole row. ``PartialForward`` refuses
models whose blocks mix tokens by other means than attention, or pass each other more than the residual stream.

Shapes: R variants, L tokens, S recomputed tokens (from ``start`` on), D hidden size, V vocabulary size.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mm.causal.interventions.activation_cache import ActivationCache
from lightning_mm.causal.interventions.interventions import Intervention, apply_interventions
from lightning_mm.core.errors import UserError
from lightning_mm.models.attention.interception import Attend, AttentionCall, attention_through
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import read_out
from lightning_mm.models.layout import ModelLayout

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_ROUNDING_TOLERANCE = 0.013
"""Tolerated root mean square error of one block in 16 bits, as a fraction of the logits' standard deviation. Rounding
errors of blocks add up like independent ones, with the square root of their number: the largest measured error is 5.1 %
after 30 blocks, while a partial forward that ignores earlier tokens is off by 10 % after 4. The maximum error is not
used: it grows with the vocabulary."""


class PartialForward:
    """Recomputes variants of one cached run from a layer and token on.

    Args:
        mm: The unwrapped model in eval mode.
        base: Activations of the run, of one row.

    Raises:
        UserError: The model mixes tokens by other means than attention, its blocks share mutable state, or recomputing
            the run does not reproduce its logits.
    """

    def __init__(self, mm: MultimodalModel, base: ActivationCache) -> None:
        assert len(base.logits) == 1, "the base run has one row; variants are a batch"
        self.mm, self.base = mm, base
        self.num_layers = mm.layout.num_layers
        _require_attention(mm.layout, base)
        _refuse_shared_state(base)
        self._between = {
            layer: gap
            for layer in range(1, self.num_layers)
            if (gap := base.block_inputs[layer] - base.values["residual", layer - 1]).any()
        }
        self._last_visible = _last_visible_token(base)
        self._verify()

    def restart_position(self, token: int) -> int:
        """The last position at or before ``token`` from which the run can be recomputed.

        It is the token itself if attention is causal; otherwise the first token of the bidirectional part that contains
        it: the first image token in some models, 0 in prefix-LMs.
        """
        next_token = torch.arange(1, token + 1)
        is_closed = (self._last_visible[:token] < next_token).nonzero().flatten()
        return int(is_closed[-1]) + 1 if len(is_closed) else 0

    @torch.no_grad()
    def logits(
        self,
        interventions: Sequence[Intervention] = (),
        *,
        variants: int = 1,
        layer: int = 0,
        start: int = 0,
        stream: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Last-token logits of the variants.

        Args:
            interventions: Interventions with positions of the whole run; those that differ by variant have R rows.
            variants: R, the number of variants.
            layer: First block that differs from the base run.
            start: First token that differs from the base run, as ``restart_position`` returns it.
            stream: (R, S, D) input of that block; None: that of the base run.
            attend: Replaces the attention function; its calls hold all keys, and the queries and mask of the S tokens;
                None: the model's own.

        Returns:
            (R, V) float32 logits.

        Raises:
            UserError: A token before ``start`` attends to it.
        """
        hidden_RSD = self.hidden(
            interventions, variants=variants, layer=layer, start=start, stream=stream, attend=attend
        )
        return read_out(self.mm, hidden_RSD[:, -1], self.base.returns_tuple)

    def hidden(
        self,
        interventions: Sequence[Intervention] = (),
        *,
        variants: int = 1,
        layer: int = 0,
        start: int = 0,
        stream: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Output of the last block, differentiable if gradients are enabled; arguments as for ``logits``.

        Returns:
            (R, S, D) hidden states before the final norm.

        Raises:
            UserError: A token before ``start`` attends to it.
        """
        assert 0 <= layer <= self.num_layers
        if start != self.restart_position(start):
            raise _unsupported(f"its attention looks ahead: tokens before token {start} see it")
        if stream is None:
            stream = self._entering(layer, start).expand(variants, -1, -1)
        shifted = [each.shifted(start) for each in interventions]
        with apply_interventions(self.mm, shifted), self._with_cached_keys(start, attend):
            for index in range(layer, self.num_layers):
                stream = self._block(index, stream, start)
        return stream

    def _entering(self, layer: int, start: int) -> Tensor:
        if layer == self.num_layers:
            return self.base.values["residual", layer - 1][:, start:]
        return self.base.block_inputs[layer][:, start:]

    def _block(self, index: int, stream_RSD: Tensor, start: int) -> Tensor:
        """Run one block on the last S tokens, and add what the model adds after it (deepstack image features)."""
        args, kwargs = self.base.block_arguments[index]
        rest = [_slice_argument(value, start, self.base.length, len(stream_RSD)) for value in args]
        named = {key: _slice_argument(value, start, self.base.length, len(stream_RSD)) for key, value in kwargs.items()}
        output = self.mm.model.get_submodule(self.mm.layout.layers[index])(stream_RSD, *rest, **named)
        stream_RSD = output if isinstance(output, Tensor) else output[0]
        gap = self._between.get(index + 1)
        return stream_RSD if gap is None else stream_RSD + gap[:, start:]

    def _with_cached_keys(self, start: int, attend: Attend | None) -> Any:
        """Context in which the last S tokens attend to all tokens: cached keys and values come before theirs."""

        def attend_to_all(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            recorded = self.base.attention_calls[call.layer]
            call = call.changed(mask=None if recorded.mask is None else recorded.mask[..., start:, :])
            if recorded.key.shape[2] == self.base.length:
                key, value = (
                    torch.cat([old[:, :, :start].expand(len(new), -1, -1, -1), new], 2)
                    for old, new in ((recorded.key, call.key), (recorded.value, call.value))
                )
                call = call.changed(key=key, value=value)
            return call.compute() if attend is None else attend(call)

        return attention_through(self.mm, attend_to_all)

    def _verify(self) -> None:
        """Check that recomputing reproduces the run's logits: all of it, and from the last possible token on."""
        middle, last = self.num_layers // 2, self.restart_position(self.base.length - 1)
        # Under autocast, rotary embeddings make queries wider than values.
        types = {
            each.dtype for call in self.base.attention_calls.values() for each in (call.query, call.key, call.value)
        }
        exact = max((_TOLERANCE[dtype] for dtype in types if dtype in _TOLERANCE), default=0.0)
        rounds = bool(types - set(_TOLERANCE)) or not types or torch.is_autocast_enabled(self.base.logits.device.type)
        for layer, start in dict.fromkeys([(0, 0), (0, last), (middle, last)]):
            base = self.base.logits
            # Some models mask tokens that are never generated (image tokens, vocabulary padding) by the lowest number.
            is_real = base > torch.finfo(base.dtype).min / 2
            gap = (self.logits(layer=layer, start=start) - base)[is_real]
            error = float(gap.square().mean().sqrt() / base[is_real].std().clamp_min(1e-6))
            if not error <= max(exact, _ROUNDING_TOLERANCE * math.sqrt(self.num_layers - layer) if rounds else 0.0):
                change = f"changes the logits by {error:.2g} of their spread"
                raise _unsupported(f"computing it again from layer {layer} and token {start} {change}")


def _require_attention(layout: ModelLayout, base: ActivationCache) -> None:
    for block in layout.blocks:
        if block.index not in base.block_inputs:
            raise _unsupported(f"layer {block.index} takes no part in it")
        if block.attention is not None and block.index not in base.attention_calls:
            raise _unsupported(f"layer {block.index} mixes tokens by other means than attention")


def _refuse_shared_state(base: ActivationCache) -> None:
    """Refuse models whose blocks write into shared state (keys and values, Gemma 4): it holds the last run's values."""
    for layer, (args, kwargs) in base.block_arguments.items():
        for value in (*args, *kwargs.values()):
            is_cache = hasattr(value, "get_seq_length")
            if is_cache or (isinstance(value, Mapping) and value):
                raise _unsupported(f"layer {layer} is given a {type(value).__name__}, which blocks write into")


def _last_visible_token(base: ActivationCache) -> Tensor:
    """(L,) last token that any token up to this one attends to, over all layers."""
    tokens = torch.arange(base.length)
    last_L = tokens.clone()
    for call in base.attention_calls.values():
        if call.key.shape[2] != base.length:
            continue  # cross-attention to images
        if call.mask is None:
            return torch.full_like(tokens, base.length - 1)
        seen_LL = (call.mask > torch.finfo(call.mask.dtype).min / 2).flatten(0, -3).any(0).cpu()
        last_L = torch.maximum(last_L, (seen_LL * tokens).amax(1))
    return last_L.cummax(0).values


def _slice_argument(value: Any, start: int, length: int, variants: int) -> Any:
    """An argument of a block, sliced to the last tokens and repeated for every variant."""
    if isinstance(value, tuple | list):
        return type(value)(_slice_argument(each, start, length, variants) for each in value)
    if not isinstance(value, Tensor):
        return value
    # The token dimension is the last but one (rotary embeddings, masks), else the first other one that fits.
    order = [value.ndim - 2, *reversed(range(value.ndim - 2)), value.ndim - 1] if value.ndim > 2 else [value.ndim - 1]
    axis = next((axis for axis in order if axis >= 0 and value.shape[axis] == length), None)
    if axis is not None:
        value = value.narrow(axis, start, length - start)
    if value.ndim > 2 and len(value) == 1:
        return value.expand(variants, *value.shape[1:])
    # Without a token dimension it belongs to the images (vision tower states by tile): repeated for every variant.
    return value.repeat(variants, *[1] * (value.ndim - 1)) if value.ndim > 2 and axis is None else value


def _unsupported(why: str) -> UserError:
    return UserError(
        "This run cannot be computed again from the middle.",
        f"{why[0].upper()}{why[1:]}.",
        "Trace with --tracing.plain true, which runs the whole model for every intervention; other parts need a causal "
        "model.",
    )
