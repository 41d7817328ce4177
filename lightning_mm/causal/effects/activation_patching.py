"""Causal tracing by activation patching: which layer, at which token, carries the constraint of a question.

Multimodal causal tracing after Basu et al. 2024, arXiv:2406.04236.

Data flow: cached clean run and cached corrupted run -> the corrupted run with the clean activations of one site patched
in, for every site, layer and unit (``PartialForward`` computes only what can differ) -> ``CausalTrace``: the answer's
probability. With a shortlist, attribution patching (Nanda 2023) ranks all units by a first-order estimate first.

Tokens before the first one that the corruption changes are equal in both runs and are left out.

Shapes: S sites, N layers, U units (a token, or a run of image tokens, patched together), R units of a batch, P
positions of its longest unit, L tokens, D hidden size, V vocabulary size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.causal.interventions.activation_cache import ActivationCache, cache_activations
from lightning_mm.causal.interventions.corruption import CorruptedQuestion
from lightning_mm.causal.interventions.interventions import (
    Site,
    add_vector,
    apply_interventions,
    layer_window,
    patch_from,
)
from lightning_mm.causal.interventions.partial_forward import PartialForward
from lightning_mm.causal.questions.question import EncodedQuestion, last_logits, to_model_device
from lightning_mm.core.errors import UserError
from lightning_mm.models.handle import MultimodalModel

MIN_PROBABILITY_DROP = 0.05
"""A trace is valid if the corruption lowers the answer's probability by at least this much."""


@dataclass(frozen=True)
class TraceConfig:
    """How to trace.

    Args:
        sites: What is put back.
        width: Of the window of layers.
        convention: What a width means: ``p2`` (2w + 1 layers, 1 is one layer) or ``rome`` (w layers).
        image_units: Into how many runs the picture's tokens are cut, where the corruption changes them.
        shortlist: Compute only so many of each site exactly: those that attribution patching ranks first; None: all.
        plain: Run the whole model for each; slow, for models that ``Replay`` refuses.
        batch_tokens: Tokens computed at a time.
    """

    sites: tuple[Site, ...] = ("mlp", "attention")
    width: int = 1
    convention: Literal["p2", "rome"] = "p2"
    image_units: int = 16
    shortlist: int | None = None
    plain: bool = False
    batch_tokens: int = 512

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("width", "image_units", "batch_tokens", "shortlist")}
        small = [f"{name} is {count}" for name, count in counts.items() if count is not None and count < 1]
        if small or not self.sites:
            raise UserError(
                "There is nothing to trace with.",
                f"{', '.join(small) or 'No site is named'}.",
                "Give 1 or more of each, and mlp, attention or residual as sites.",
            )


@dataclass(frozen=True, eq=False)
class CausalTrace:
    """The causal trace of one question.

    Args:
        encoded: The question.
        target: Token that is followed: the clean run's answer, or the first token of the given answer.
        rival: Token that the corrupted run answers with.
        sites: The S sites that were patched.
        units: Token positions of each of the U units.
        p_clean: Probability of the target in the clean run.
        p_corrupt: Probability of the target in the corrupted run.
        logit_difference_clean: Logit of the target minus that of the rival in the clean run.
        logit_difference_corrupt: The same difference in the corrupted run.
        restored: (S, N, U) probability of the target with that unit patched; NaN if it was not computed.
        logit_difference: (S, N, U) logit difference with that unit patched; NaN if it was not computed.
    """

    encoded: EncodedQuestion
    target: int
    rival: int
    sites: tuple[Site, ...]
    units: tuple[Tensor, ...]
    p_clean: float
    p_corrupt: float
    logit_difference_clean: float
    logit_difference_corrupt: float
    restored: Tensor
    logit_difference: Tensor

    @property
    def effect(self) -> Tensor:
        """(S, N, U) indirect effect: increase of the target's probability over the corrupted run."""
        return self.restored - self.p_corrupt

    @property
    def is_valid(self) -> bool:
        """Whether the corruption lowered the target's probability enough to normalize by."""
        return self.p_clean - self.p_corrupt >= MIN_PROBABILITY_DROP

    @property
    def normalized_effect(self) -> Tensor:
        """(S, N, U) normalized indirect effect: 1 restores the clean probability; NaN if the trace is not valid."""
        drop = self.p_clean - self.p_corrupt
        return self.effect / (drop if self.is_valid else float("nan"))

    @property
    def normalized_logit_effect(self) -> Tensor:
        """(S, N, U) normalized effect on the logit difference between target and rival, which does not saturate."""
        drop = self.logit_difference_clean - self.logit_difference_corrupt
        return (self.logit_difference - self.logit_difference_corrupt) / (drop if drop > 0 else float("nan"))

    @property
    def classes(self) -> tuple[str, ...]:
        """(U) token class of each unit, one of ``TOKEN_CLASSES``."""
        classes = self.encoded.classes
        return tuple(classes[int(unit[-1])] for unit in self.units)


def causal_trace(
    mm: MultimodalModel,
    encoded: EncodedQuestion,
    corrupted: CorruptedQuestion,
    config: TraceConfig,
    target: int | None = None,
) -> CausalTrace:
    """Trace one question: patch clean activations into the corrupted run, unit by unit.

    Args:
        mm: The unwrapped model in eval mode.
        encoded: The clean question.
        corrupted: Its corruption, of equal length.
        config: What to patch, and how.
        target: Token to follow; None: the clean run's answer.

    Raises:
        UserError: The model cannot be recomputed from the middle, and ``config.plain`` is off.
    """
    clean = cache_activations(mm, encoded.inputs, sites=(*config.sites, "residual"))
    with corrupted.applied(mm):
        base = cache_activations(mm, corrupted.inputs, sites=("residual",))
    target = int(clean.logits.argmax()) if target is None else target
    rival = _rival_token(base.logits[0], target)
    units = patch_units(encoded, clean, base, config.image_units)
    read = _TargetReader(target, rival)
    run_patched = _FullPatching(mm, corrupted) if config.plain else _PartialPatching(mm, base)
    shortlist = _shortlist(mm, corrupted, clean, config, units, read)
    restored = torch.full((len(config.sites), mm.layout.num_layers, len(units), 2), float("nan"), dtype=torch.float64)
    for s, site in enumerate(config.sites):
        for layer in range(mm.layout.num_layers):
            layers = layer_window(layer, config.width, mm.layout.num_layers, config.convention)
            for some in batch_units(shortlist[s][layer], units, encoded.length, config.batch_tokens):
                logits = run_patched(site, layers, pad_units([units[u] for u in some]), clean)
                restored[s, layer, some] = read(logits)
    (p_clean, d_clean), (p_corrupt, d_corrupt) = (read(run.logits)[0].tolist() for run in (clean, base))
    return CausalTrace(
        encoded,
        target,
        rival,
        config.sites,
        tuple(units),
        p_clean,
        p_corrupt,
        d_clean,
        d_corrupt,
        restored[..., 0],
        restored[..., 1],
    )


@dataclass(frozen=True)
class _TargetReader:
    """Reads (R, 2) from logits: probability of the target, and its logit minus the rival's."""

    target: int
    rival: int

    def __call__(self, logits_RV: Tensor) -> Tensor:
        logits_RV = logits_RV.double()
        chance = logits_RV.softmax(-1)[:, self.target]
        return torch.stack([chance, logits_RV[:, self.target] - logits_RV[:, self.rival]], 1).cpu()


class _PartialPatching:
    """Patches clean values by recomputing the corrupted run from the patched layer and token on."""

    def __init__(self, mm: MultimodalModel, base: ActivationCache) -> None:
        self.partial_forward = PartialForward(mm, base)

    def __call__(self, site: Site, layers: Sequence[int], positions_RP: Tensor, clean: ActivationCache) -> Tensor:
        start = self.partial_forward.restart_position(int(positions_RP.min()))
        back = patch_from(site, layers, positions_RP, clean.values)
        return self.partial_forward.logits([back], variants=len(positions_RP), layer=min(layers), start=start)


class _FullPatching:
    """Patches clean values by running the whole model on the corrupted inputs."""

    def __init__(self, mm: MultimodalModel, corrupted: CorruptedQuestion) -> None:
        self.mm, self.corrupted = mm, corrupted

    def __call__(self, site: Site, layers: Sequence[int], positions_RP: Tensor, clean: ActivationCache) -> Tensor:
        answers = []
        for positions_P in positions_RP:
            back = patch_from(site, layers, positions_P, clean.values)
            with self.corrupted.applied(self.mm), apply_interventions(self.mm, [back]):
                answers.append(last_logits(self.mm, self.corrupted.inputs))
        return torch.cat(answers)


def _rival_token(logits_V: Tensor, target: int) -> int:
    """The corrupted run's answer, or its second choice if the first is the target."""
    best, second = logits_V.topk(2).indices.tolist()
    return int(second if best == target else best)


def _shortlist(
    mm: MultimodalModel,
    corrupted: CorruptedQuestion,
    clean: ActivationCache,
    config: TraceConfig,
    units: Sequence[Tensor],
    read: _TargetReader,
) -> list[list[list[int]]]:
    """Units to patch exactly, by site and layer: all, or those with the largest attribution scores."""
    every = list(range(len(units)))
    if config.shortlist is None:
        return [[every] * mm.layout.num_layers for _ in config.sites]
    chosen = []
    for site in config.sites:
        guess = attribution_scores(mm, corrupted, clean, site, units, read.target, read.rival).abs()
        best = torch.zeros_like(guess, dtype=torch.bool).flatten()
        best[guess.flatten().topk(min(config.shortlist, guess.numel())).indices] = True
        chosen.append([row.nonzero().flatten().tolist() for row in best.view_as(guess)])
    return chosen


def attribution_scores(
    mm: MultimodalModel,
    corrupted: CorruptedQuestion,
    clean: ActivationCache,
    site: Site,
    units: Sequence[Tensor],
    target: int,
    rival: int,
) -> Tensor:
    """(N, U) first-order estimate of the effect of each patch on the logit difference, from one backward pass.

    Attribution patching: gradient in the corrupted run times clean minus corrupted values (Nanda 2023).

    Args:
        mm: The unwrapped model in eval mode.
        corrupted: The corrupted question.
        clean: Activations of the clean run, with ``site``.
        site: Site that would be patched.
        units: Token positions of each of the U units.
        target: Token whose logit counts.
        rival: Token whose logit is subtracted.
    """
    shape = (1, clean.length, clean.block_inputs[0].shape[2])
    device = clean.block_inputs[0].device
    moves = [torch.zeros(shape, device=device, requires_grad=True) for _ in range(mm.layout.num_layers)]
    with corrupted.applied(mm):
        values = cache_activations(mm, corrupted.inputs, sites=(site,)).values
        moved = [add_vector(site, [layer], None, move) for layer, move in enumerate(moves)]
        with torch.enable_grad(), apply_interventions(mm, moved):
            logits = mm.model(**to_model_device(mm, corrupted.inputs), use_cache=False).logits[0, -1].float()
            gradients = torch.autograd.grad(logits[target] - logits[rival], moves)
    per_token = torch.stack(
        [
            ((clean.values[site, layer] - values[site, layer]).float() * gradient.float()).sum(-1)[0]
            for layer, gradient in enumerate(gradients)
        ]
    ).cpu()
    return torch.stack([per_token[:, unit].sum(1) for unit in units], 1)


def patch_units(
    encoded: EncodedQuestion, clean: ActivationCache, base: ActivationCache, image_units: int
) -> list[Tensor]:
    """Units from the first changed token on: every text token, and the image tokens in ``image_units`` runs."""
    # Over all layers: with cross-attention to the image, embeddings do not show that it has changed.
    layers = [(clean.block_inputs[layer] != base.block_inputs[layer]).any(-1)[0] for layer in clean.block_inputs]
    changed = torch.stack(layers).any(0).nonzero().flatten()
    if not len(changed):
        raise UserError(
            "The corruption changes nothing.", "Both runs are the same in all layers.", "Choose another corruption."
        )
    first, pictured = int(changed[0]), encoded.image.tolist()
    late = [position for position in pictured if position >= first]
    runs = [run for run in torch.tensor(late).tensor_split(image_units) if len(run)] if late else []
    text = [torch.tensor([position]) for position in range(first, encoded.length) if position not in set(pictured)]
    return sorted([*runs, *text], key=lambda unit: int(unit[0]))


def batch_units(chosen: Sequence[int], units: Sequence[Tensor], length: int, tokens: int) -> Iterator[list[int]]:
    """Batches of units with at most ``tokens`` recomputed tokens; later units need fewer tokens each."""
    batch: list[int] = []
    for unit in chosen:
        span = length - int(units[batch[0] if batch else unit][0])
        if batch and (len(batch) + 1) * span > tokens:
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch


def pad_units(units: Sequence[Tensor]) -> Tensor:
    """(R, P) positions of units; shorter ones repeat their last token."""
    longest = max(map(len, units))
    return torch.stack([torch.cat([unit, unit[-1:].expand(longest - len(unit))]) for unit in units])
