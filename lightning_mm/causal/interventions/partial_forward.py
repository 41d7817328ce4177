"""A run computed again from the middle: from some layer and token on, many variants at a time.

Data flow: ``Recording`` of the base run + variants (interventions, hidden states put in) -> only the blocks and tokens
that can differ are computed, keys and values of all earlier tokens are the recorded ones -> logits of each variant.

Exact where attention is causal: what stands before a token, the picture above all, does not know what comes after it.
Where tokens see later ones, all that are seen with them are computed again, the whole row if need be. Where a block
mixes tokens by other means than attention, or blocks hand each other more than the stream, ``Replay`` refuses.

Shapes: R variants, L tokens, S of them computed again (from ``start`` on), D hidden size, G key heads, E head size,
V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mm.causal.interventions.activation_cache import Recording
from lightning_mm.causal.interventions.interventions import Intervention, intervened
from lightning_mm.core.errors import UserError
from lightning_mm.models.attention.interception import Attend, AttentionCall, attention_through
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import read_out
from lightning_mm.models.layout import ModelLayout

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_COARSE = 0.013
"""Root mean square error over the logits' spread; in 16 bits, of one block. Roundings of blocks add up like independent
errors, with the root of their number: the most that was seen is 5.1 % behind 30 blocks, and a replay that forgets what
stands before is off by 10 % behind 4. The largest error grows with the vocabulary, and would tell nothing."""


class Replay:
    """Variants of one recorded run.

    Args:
        model: The plain model in eval mode.
        layout: Of it.
        base: The run, of one row.

    Raises:
        UserError: The model mixes tokens by other means than attention, its blocks share what they write into, or the
            run computed again is not the recorded one.
    """

    def __init__(self, mm: MultimodalModel, base: Recording) -> None:
        assert len(base.logits) == 1, "one row is replayed, in many variants"
        self.mm, self.base = mm, base
        self.num_layers = mm.layout.num_layers
        _refuse_unless_attended(mm.layout, base)
        _refuse_shared(base)
        self._between = {
            layer: gap
            for layer in range(1, self.num_layers)
            if (gap := base.entered[layer] - base.values["residual", layer - 1]).any()
        }
        self._reach = _reach(base)
        self._verify()

    def start_for(self, token: int) -> int:
        """The last token at or before ``token`` from which a run can be computed again.

        It is the token itself, but where tokens see later ones: the first patch of its picture in some models, and 0
        in those whose prompt is seen both ways.
        """
        behind = torch.arange(1, token + 1)
        sound = (self._reach[:token] < behind).nonzero().flatten()
        return int(sound[-1]) + 1 if len(sound) else 0

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
            interventions: In the positions of the whole run; those that differ by row have R rows.
            variants: R.
            layer: The first block that differs.
            start: The first token that differs.
            stream: (R, S, D) what enters that block in place of what was recorded.
            attend: Answers for attention in place of the model's kernel; its calls hold all keys, and the queries and
                mask of the S tokens.

        Returns:
            (R, V) float32.

        Raises:
            UserError: An earlier token sees ``start``.
        """
        hidden_RSD = self.hidden(
            interventions, variants=variants, layer=layer, start=start, stream=stream, attend=attend
        )
        return read_out(self.mm, hidden_RSD[:, -1], self.base.tuples)

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
        """What the last block puts out, with its graph where gradients are on; arguments as of ``logits``.

        Returns:
            (R, S, D) before the final norm.

        Raises:
            UserError: An earlier token sees ``start``.
        """
        assert 0 <= layer <= self.num_layers
        if start != self.start_for(start):
            raise _refusal(f"its attention looks ahead: tokens before token {start} see it")
        if stream is None:
            stream = self._entering(layer, start).expand(variants, -1, -1)
        shifted = [each.shifted(start) for each in interventions]
        with intervened(self.mm, shifted), self._rejoined(start, attend):
            for index in range(layer, self.num_layers):
                stream = self._block(index, stream, start)
        return stream

    def _entering(self, layer: int, start: int) -> Tensor:
        if layer == self.num_layers:
            return self.base.values["residual", layer - 1][:, start:]
        return self.base.entered[layer][:, start:]

    def _block(self, index: int, stream_RSD: Tensor, start: int) -> Tensor:
        """One block on the last S tokens, and what the model adds behind it."""
        args, kwargs = self.base.arguments[index]
        rest = [_suffix(value, start, self.base.length, len(stream_RSD)) for value in args]
        named = {key: _suffix(value, start, self.base.length, len(stream_RSD)) for key, value in kwargs.items()}
        output = self.mm.model.get_submodule(self.mm.layout.layers[index])(stream_RSD, *rest, **named)
        stream_RSD = output if isinstance(output, Tensor) else output[0]
        gap = self._between.get(index + 1)
        return stream_RSD if gap is None else stream_RSD + gap[:, start:]

    def _rejoined(self, start: int, attend: Attend | None) -> Any:
        """Attention of the last S tokens to all: recorded keys and values before them."""

        def joined(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            recorded = self.base.calls[call.layer]
            call = call.changed(mask=None if recorded.mask is None else recorded.mask[..., start:, :])
            if recorded.key.shape[2] == self.base.length:
                key, value = (
                    torch.cat([old[:, :, :start].expand(len(new), -1, -1, -1), new], 2)
                    for old, new in ((recorded.key, call.key), (recorded.value, call.value))
                )
                call = call.changed(key=key, value=value)
            return call.compute() if attend is None else attend(call)

        return attention_through(self.mm, joined)

    def _verify(self) -> None:
        """Equal to the recorded run when computed again, from the last token that can be begun at, too."""
        middle, last = self.num_layers // 2, self.start_for(self.base.length - 1)
        # Queries may be wide where values are not: under autocast, rotations make them so.
        types = {each.dtype for call in self.base.calls.values() for each in (call.query, call.key, call.value)}
        exact = max((_TOLERANCE[dtype] for dtype in types if dtype in _TOLERANCE), default=0.0)
        rounds = bool(types - set(_TOLERANCE)) or not types or torch.is_autocast_enabled(self.base.logits.device.type)
        for layer, start in dict.fromkeys([(0, 0), (0, last), (middle, last)]):
            base = self.base.logits
            # What a model never says (image tokens, padding of the vocabulary) some mask by the lowest number there is.
            said = base > torch.finfo(base.dtype).min / 2
            gap = (self.logits(layer=layer, start=start) - base)[said]
            error = float(gap.square().mean().sqrt() / base[said].std().clamp_min(1e-6))
            if not error <= max(exact, _COARSE * math.sqrt(self.num_layers - layer) if rounds else 0.0):
                told = f"changes the logits by {error:.2g} of their spread"
                raise _refusal(f"computing it again from layer {layer} and token {start} {told}")


def _refuse_unless_attended(layout: ModelLayout, base: Recording) -> None:
    for block in layout.blocks:
        if block.index not in base.entered:
            raise _refusal(f"layer {block.index} takes no part in it")
        if block.attention is not None and block.index not in base.calls:
            raise _refusal(f"layer {block.index} mixes tokens by other means than attention")


def _refuse_shared(base: Recording) -> None:
    """What blocks write into for later ones (keys and values, Gemma 4) holds the last run's, whichever that was."""
    for layer, (args, kwargs) in base.arguments.items():
        for value in (*args, *kwargs.values()):
            is_cache = hasattr(value, "get_seq_length")
            if is_cache or (isinstance(value, Mapping) and value):
                raise _refusal(f"layer {layer} is given a {type(value).__name__}, which blocks write into")


def _reach(base: Recording) -> Tensor:
    """(L,) the last token that any token up to this one sees, over all layers."""
    tokens = torch.arange(base.length)
    reach_L = tokens.clone()
    for call in base.calls.values():
        if call.key.shape[2] != base.length:
            continue  # keys from elsewhere: cross-attention to pictures
        if call.mask is None:
            return torch.full_like(tokens, base.length - 1)
        seen_LL = (call.mask > torch.finfo(call.mask.dtype).min / 2).flatten(0, -3).any(0).cpu()
        reach_L = torch.maximum(reach_L, (seen_LL * tokens).amax(1))
    return reach_L.cummax(0).values


def _suffix(value: Any, start: int, length: int, variants: int) -> Any:
    """What a block was given, for its last tokens only, and for every variant."""
    if isinstance(value, tuple | list):
        return type(value)(_suffix(each, start, length, variants) for each in value)
    if not isinstance(value, Tensor):
        return value
    # By tokens first in the last dimension but one (rotations, masks of rows), then in the others.
    order = [value.ndim - 2, *reversed(range(value.ndim - 2)), value.ndim - 1] if value.ndim > 2 else [value.ndim - 1]
    axis = next((axis for axis in order if axis >= 0 and value.shape[axis] == length), None)
    if axis is not None:
        value = value.narrow(axis, start, length - start)
    if value.ndim > 2 and len(value) == 1:
        return value.expand(variants, *value.shape[1:])
    # What is not by tokens is by pictures (states of the vision tower, tile by tile): every variant has them.
    return value.repeat(variants, *[1] * (value.ndim - 1)) if value.ndim > 2 and axis is None else value


def _refusal(why: str) -> UserError:
    return UserError(
        "This run cannot be computed again from the middle.",
        f"{why[0].upper()}{why[1:]}.",
        "Trace with --tracing.plain true, which runs the whole model for every intervention; other parts need a causal "
        "model.",
    )
