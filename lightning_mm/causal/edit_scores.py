"""How well an edit did: efficacy, generalisation, specificity, EasyEdit's measures, and the general task's loss.

Data flow: ``Score`` per probe -> ``scores_of``: named Estimates, intervals clustered by the edited question's group;
losses of conversations before and after -> ``loss_change``.

Shapes: K conversations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_mm.causal.edit_probes import Kind, Score
from lightning_mm.data.batch import Batch
from lightning_mm.estimate import Estimate, finite, undefined
from lightning_mm.geometry.resampling import mean_interval
from lightning_mm.models.anatomy import Anatomy
from lightning_mm.objective import supervised_nll

Choose = Callable[[Score], bool]
Value = Callable[[Score], float]


def _kind(*kinds: Kind) -> Choose:
    return lambda score: score.kind in kinds


def _stays(pictured: bool) -> Choose:
    return lambda score: score.kind in ("neighbour", "unrelated") and score.pictured == pictured


MEASURES: dict[str, tuple[Choose, Value, Value | None]] = {
    "efficacy": (_kind("edited"), lambda s: s.said, lambda s: s.said_before),
    "efficacy, p(new) > p(old)": (_kind("edited"), lambda s: s.prefers, lambda s: s.preferred_before),
    "generalisation, other words": (_kind("paraphrase"), lambda s: s.said, lambda s: s.said_before),
    "generalisation, other pictures": (_kind("picture"), lambda s: s.said, lambda s: s.said_before),
    "specificity, neighbours": (_kind("neighbour"), lambda s: s.kept, None),
    "specificity, unrelated": (_kind("unrelated"), lambda s: s.kept, None),
    "KL of the first token, neighbours": (_kind("neighbour"), lambda s: s.kl, None),
    "KL of the first token, unrelated": (_kind("unrelated"), lambda s: s.kl, None),
    "rewrite_acc": (_kind("edited"), lambda s: s.share, lambda s: s.share_before),
    "rephrase_acc": (_kind("paraphrase"), lambda s: s.share, lambda s: s.share_before),
    "image_rephrase_acc": (_kind("picture"), lambda s: s.share, lambda s: s.share_before),
    "locality": (_stays(False), lambda s: s.kept_share, None),
    "multimodal_locality": (_stays(True), lambda s: s.kept_share, None),
}
"""Name -> which probes it rests on, what is averaged over them, and what that was before the edit. The last five are
EasyEdit's: shares of tokens rather than of whole answers; ``locality`` is over questions in text only."""


def scores_of(scores: Sequence[Score]) -> dict[str, Estimate]:
    """Every measure; its null is what it was before the edit, where that can be told."""
    made = {}
    for name, (chosen, value, before) in MEASURES.items():
        kept = [score for score in scores if chosen(score)]
        made[name] = _mean([value(s) for s in kept], [s.group for s in kept], bounded=not name.startswith("KL"))
        if kept and before is not None:
            made[name] = replace(made[name], null=sum(map(before, kept)) / len(kept))
    return made


def overall(scores: Sequence[Score]) -> float:
    """One number to choose layers by: the harmonic mean of efficacy, generalisation and specificity that were measured
    (Meng et al. 2022's score)."""
    parts: tuple[tuple[Kind, ...], ...] = (("edited",), ("paraphrase", "picture"), ("neighbour", "unrelated"))
    means = []
    for kinds in parts:
        rates = [float(s.kept if kinds == parts[2] else s.said) for s in scores if s.kind in kinds]
        means += [sum(rates) / len(rates)] if rates else []
    return len(means) / sum(1 / mean for mean in means) if means and min(means) > 0 else 0.0


@torch.no_grad()
def losses_of(model: nn.Module, anatomy: Anatomy, batches: Sequence[Batch], device: torch.device) -> Tensor:
    """(K, 2) float64 summed loss in nats, and supervised tokens, of each conversation, one a batch."""
    head = model.get_submodule(anatomy.head)
    found = [supervised_nll(model, head, batch.to(device)) for batch in batches]
    return torch.tensor([[float(each.nll), each.num_tokens] for each in found], dtype=torch.float64).reshape(-1, 2)


def loss_change(before_K2: Tensor, after_K2: Tensor, groups: Sequence[str]) -> tuple[Estimate, Estimate]:
    """Mean loss per supervised token after an edit (its null: before), and by how much it rose.

    Args:
        before_K2: As ``losses_of`` gives it.
        after_K2: The same conversations.
        groups: Of each: what edits they were asked after, or which conversation they are.
    """
    if not len(before_K2):
        return undefined("no conversations were given", 0), undefined("no conversations were given", 0)
    tokens_K = before_K2[:, 1]
    values = []
    for sums_K in (after_K2[:, 0], after_K2[:, 0] - before_K2[:, 0]):
        # A ratio of sums: its error is that of the residuals (linearised).
        ratio = sums_K.sum() / tokens_K.sum()
        terms_K = ratio + (sums_K - ratio * tokens_K) / tokens_K.mean()
        values.append(_mean(terms_K.tolist(), groups, bounded=False))
    return replace(values[0], null=float(before_K2[:, 0].sum() / tokens_K.sum())), values[1]


def _mean(values: Sequence[float], groups: Sequence[str], bounded: bool) -> Estimate:
    if not values:
        return undefined("no such question was given", 0)
    index = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    ids = torch.tensor([index[group] for group in groups])
    mean, low, high = (float(x) for x in mean_interval(torch.tensor([values], dtype=torch.float64), ids))
    if bounded:
        low, high = (max(0.0, low), min(1.0, high)) if not math.isnan(low) else (low, high)
    return finite(mean, len(values), low=low, high=high)
