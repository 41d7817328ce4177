"""Criteria that gradients give: one backward pass per batch on the untuned model, whose weights do not change.

Data flow: model + a few training batches -> per batch and block: squared gradient norm, a sample of the gradient ->
RGN, SNR and Fisher scores. Gradients are reduced to these numbers as they appear and freed at once, so that no more
than one tensor's gradient is in memory beside the activations.

Shapes: K batches, L decoder blocks, H halves of the batches, R resamples.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import supervised_nll
from lightning_mm.layer_selection.layer_range_search import Criterion
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout, Region
from lightning_mm.tuning.unused_parameters import only_requires_grad

GRADIENT_CRITERIA = ("rgn", "snr", "fisher")
"""Relative gradient norm, signal-to-noise ratio, empirical Fisher information."""


@dataclass(frozen=True, eq=False)
class GradientScores:
    """Gradient statistics of every decoder block; zero, and NaN as a ratio, where no loss depends on a block.

    Args:
        relative_norm: (K, L) RGN = ||g|| / ||theta|| of each batch (Lee et al. 2023, arXiv:2210.11466).
        fisher: (K, L) ||g||^2 per weight: the trace of the empirical Fisher matrix by batches, per parameter.
        signal_to_noise: (L,) ||mean g||^2 / mean ||g - mean g||^2 over a fixed sample of the block's weights.
        signal_to_noise_halves: (H, L) of every half of the batches.
    """

    relative_norm: Tensor
    fisher: Tensor
    signal_to_noise: Tensor
    signal_to_noise_halves: Tensor


_SAMPLED = 4096
"""Entries of each tensor whose gradients are kept per batch, for the signal-to-noise ratio."""


def try_gradient_scores(
    mm: MultimodalModel, batches: Sequence[Batch], device: torch.device, criteria: Collection[str]
) -> GradientScores | None:
    """``gradient_scores``; None where no criterion needs them, or, with the reason logged, where they are undefined."""
    if not set(GRADIENT_CRITERIA) & set(criteria):
        return None
    why = ""
    if len(batches) < 2:
        why = f"{len(batches)} batches to take a loss of, and 2 are needed: give conversations (data.train, --data)"
    elif any(not p.is_floating_point() for p in _block_weights(mm).values()):
        why = "the blocks are quantised, and gradients of whole numbers are not defined"
    else:
        try:
            return gradient_scores(mm, batches, device)
        except (torch.OutOfMemoryError, MemoryError) as error:
            why = f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    log_decision("auto.criteria", "without gradients", why)
    return None


def gradient_scores(mm: MultimodalModel, batches: Sequence[Batch], device: torch.device) -> GradientScores:
    """Gradient statistics of every block, of a model in eval mode; ``requires_grad`` is as before afterwards.

    Args:
        mm: The plain model, all of whose block weights are floating point. Adapters count as part of the function,
            not of the weights.
        batches: At least two.
        device: Of the model.
    """
    names = _block_weights(mm)
    blocks = {name: mm.layout.location_of(name).layer for name in names}
    squared = torch.zeros(len(batches), mm.layout.num_layers, dtype=torch.float64)
    sampled: list[dict[str, Tensor]] = []
    for index, batch in enumerate(batches):
        kept: dict[str, Tensor] = {}

        def note(name: str, gradient: Tensor, index: int = index, kept: dict[str, Tensor] = kept) -> None:
            flat = gradient.float().flatten()
            squared[index, blocks[name]] += float(flat.square().sum())
            kept[name] = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].cpu()

        with _gradients_to(note, mm.model, names), torch.enable_grad():
            objective = supervised_nll(mm.model, mm.model.get_submodule(mm.layout.head), batch.to(device))
            (objective.nll / max(objective.num_tokens, 1)).backward()
        sampled.append(kept)
    weights, counts = _sizes(names, blocks, mm.layout.num_layers)
    ratio = _signal_to_noise(sampled, blocks, mm.layout)
    halves = [_signal_to_noise([sampled[k] for k in half], blocks, mm.layout) for half in halves_of(len(batches))]
    return GradientScores((squared / weights).sqrt(), squared / counts, ratio, torch.stack(halves))


def gradient_criteria(gradients: GradientScores, names: Collection[str], resamples: int) -> list[Criterion]:
    """The named criteria.

    Args:
        gradients: Measured on the untuned model.
        names: Of ``GRADIENT_CRITERIA``; others are ignored.
        resamples: R, rows of ``Criterion.resampled``; halves of the batches repeat where there are fewer.
    """
    measured = {"rgn": gradients.relative_norm, "fisher": gradients.fisher}
    made = [
        Criterion(name, _log(per_batch.mean(0)), _log(half_means(per_batch, resamples)), "gradients")
        for name, per_batch in measured.items()
        if name in names
    ]
    if "snr" in names:
        halves = _cycled(_log(gradients.signal_to_noise_halves), resamples)
        made.append(Criterion("snr", _log(gradients.signal_to_noise), halves, "gradients"))
    return made


def _log(ratios: Tensor) -> Tensor:
    """Logarithms; NaN, which does not count, where a block has no gradient at all."""
    return ratios.log().where(ratios > 0, torch.nan)


def half_means(per_batch: Tensor, resamples: int) -> Tensor:
    """(R, L) means of (K, L) over halves of the batches, repeated where there are fewer than R halves."""
    return _cycled(torch.stack([per_batch[half].mean(0) for half in halves_of(len(per_batch))]), resamples)


def _cycled(rows: Tensor, count: int) -> Tensor:
    return rows.repeat(-(-count // len(rows)), 1)[:count]


def halves_of(count: int) -> list[list[int]]:
    """Every half of ``count`` batches, the larger half where the count is odd.

    Example:
        >>> halves_of(3)
        [[0, 1], [0, 2], [1, 2]]
    """
    return [list(half) for half in combinations(range(count), (count + 1) // 2)]


def _block_weights(mm: MultimodalModel) -> dict[str, nn.Parameter]:
    """The decoder blocks' own weights, without adapters, by name."""
    own = {name: p for name, p in mm.model.named_parameters() if ".lora_" not in name}
    return {name: p for name, p in own.items() if mm.layout.location_of(name).region is Region.LAYERS}


def _sizes(names: dict[str, nn.Parameter], blocks: dict[str, int | None], num_layers: int) -> tuple[Tensor, Tensor]:
    """(L,) squared norm of each block's weights, and (L,) their number."""
    weights, counts = torch.zeros(2, num_layers, dtype=torch.float64)
    for name, parameter in names.items():
        weights[blocks[name]] += float(parameter.detach().float().square().sum())
        counts[blocks[name]] += parameter.numel()
    return weights, counts


def _signal_to_noise(sampled: list[dict[str, Tensor]], blocks: dict[str, int | None], layout: ModelLayout) -> Tensor:
    """(L,) ratio over some batches' sampled gradients; NaN where a block has none."""
    signal, noise = torch.zeros(2, layout.num_layers, dtype=torch.float64)
    every = {name: gradient for kept in sampled for name, gradient in kept.items()}
    for name, one in every.items():
        # A batch whose loss does not depend on a tensor (cross-attention without a picture) has gradient zero there.
        gradients = torch.stack([kept.get(name, torch.zeros_like(one)) for kept in sampled]).double()
        mean = gradients.mean(0)
        signal[blocks[name]] += float(mean.square().sum())
        noise[blocks[name]] += float((gradients - mean).square().sum(1).mean())
    return (signal / noise.clamp_min(1e-30)).where(signal > 0, torch.nan)


@contextmanager
def _gradients_to(
    note: Callable[[str, Tensor], None], model: nn.Module, names: dict[str, nn.Parameter]
) -> Iterator[None]:
    """While active, only the named parameters get gradients, and each is handed to ``note`` and freed at once."""

    def hook(parameter: Tensor, name: str) -> None:
        assert parameter.grad is not None
        note(name, parameter.grad)
        parameter.grad = None

    with only_requires_grad(model, names.values()), ExitStack() as hooks:
        for name, parameter in names.items():
            hooks.enter_context(parameter.register_post_accumulate_grad_hook(partial(hook, name=name)))
        yield
