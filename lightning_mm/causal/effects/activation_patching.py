"""Multimodal causal tracing (2406.04236): which layer, at which token, carries what the constraint of a question says.

Data flow: clean run and corrupt run recorded -> the corrupt run again, with one site of the clean run put back, for
every site, layer and token (``replay``: only what can differ is computed) -> ``Trace``: the answer's probability.

Tokens before the first one that the corruption changes are the same in both runs; putting them back does nothing, and
they are left out.

Shapes: S sites, N layers, U units (a token, or a run of a picture's tokens, put back together), L tokens, V vocabulary.

Attribution patching: a first-order guess of every trace at once, to choose what is worth computing exactly.

Data flow: clean values + one backward pass of the corrupt run -> guess per layer and unit -> ``tracing``'s shortlist.

Shapes: N layers, U units, L tokens, D hidden size.

What is put back together in one go, and what is computed together.

Data flow: clean run + corrupt run -> units: tokens, or runs of a picture's tokens -> batches of them.

Shapes: U units, R units of a batch, P positions of the longest, L tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.causal.interventions.activation_cache import Recording, record
from lightning_mm.causal.interventions.corruption import Corrupt
from lightning_mm.causal.interventions.interventions import Site, add, intervened, patch, window
from lightning_mm.causal.interventions.partial_forward import Replay
from lightning_mm.causal.questions.question import Asked, last_logits, on_device
from lightning_mm.core.errors import UserError
from lightning_mm.models.handle import MultimodalModel


def attribution(
    mm: MultimodalModel,
    corrupt: Corrupt,
    clean: Recording,
    site: Site,
    units: Sequence[Tensor],
    target: int,
    rival: int,
) -> Tensor:
    """(N, U) first-order guess of what putting each unit back does to the logit difference, in one backward pass.

    Attribution patching: the gradient at the corrupt run times clean minus corrupt values (Nanda 2023).
    """
    shape = (1, clean.length, clean.entered[0].shape[2])
    device = clean.entered[0].device
    moves = [torch.zeros(shape, device=device, requires_grad=True) for _ in range(mm.layout.num_layers)]
    with corrupt.applied(mm):
        values = record(mm, corrupt.inputs, sites=(site,)).values
        moved = [add(site, [layer], None, move) for layer, move in enumerate(moves)]
        with torch.enable_grad(), intervened(mm, moved):
            logits = mm.model(**on_device(mm, corrupt.inputs), use_cache=False).logits[0, -1].float()
            gradients = torch.autograd.grad(logits[target] - logits[rival], moves)
    per_token = torch.stack(
        [
            ((clean.values[site, layer] - values[site, layer]).float() * gradient.float()).sum(-1)[0]
            for layer, gradient in enumerate(gradients)
        ]
    ).cpu()
    return torch.stack([per_token[:, unit].sum(1) for unit in units], 1)


def units_of(asked: Asked, clean: Recording, base: Recording, image_units: int) -> list[Tensor]:
    """Runs of tokens from the first changed one on: each token of the text, the picture's in ``image_units`` runs."""
    # In all layers: where attention reads the picture from outside, embeddings do not know that it has changed.
    layers = [(clean.entered[layer] != base.entered[layer]).any(-1)[0] for layer in clean.entered]
    changed = torch.stack(layers).any(0).nonzero().flatten()
    if not len(changed):
        raise UserError(
            "The corruption changes nothing.", "Both runs are the same in all layers.", "Choose another corruption."
        )
    first, pictured = int(changed[0]), asked.image.tolist()
    late = [position for position in pictured if position >= first]
    runs = [run for run in torch.tensor(late).tensor_split(image_units) if len(run)] if late else []
    text = [torch.tensor([position]) for position in range(first, asked.length) if position not in set(pictured)]
    return sorted([*runs, *text], key=lambda unit: int(unit[0]))


def batches(jobs: Sequence[int], units: Sequence[Tensor], length: int, tokens: int) -> Iterator[list[int]]:
    """Units that are computed together, at most so many tokens: later ones need fewer each."""
    held: list[int] = []
    for unit in jobs:
        span = length - int(units[held[0] if held else unit][0])
        if held and (len(held) + 1) * span > tokens:
            yield held
            held = []
        held.append(unit)
    if held:
        yield held


def padded(units: Sequence[Tensor]) -> Tensor:
    """(R, P) positions; a shorter unit names its last token again."""
    longest = max(map(len, units))
    return torch.stack([torch.cat([unit, unit[-1:].expand(longest - len(unit))]) for unit in units])


LEAST_FALL = 0.05
"""A corruption that takes less than this of the answer's probability gives no effect to share out."""


@dataclass(frozen=True)
class Tracing:
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
class Trace:
    """What was found for one question.

    Args:
        asked: The question.
        target: Token that the clean run answers with (or that the given answer begins with).
        rival: Token that the corrupt run answers with.
        sites: S.
        units: Positions of each of the U units.
        p_clean: Probability of the target in the clean run.
        p_corrupt: In the corrupt run.
        difference_clean: Logit of the target minus the rival's in the clean run.
        difference_corrupt: In the corrupt run.
        restored: (S, N, U) probability of the target with that unit put back; NaN where it was not computed.
        difference: (S, N, U) logit difference likewise.
    """

    asked: Asked
    target: int
    rival: int
    sites: tuple[Site, ...]
    units: tuple[Tensor, ...]
    p_clean: float
    p_corrupt: float
    difference_clean: float
    difference_corrupt: float
    restored: Tensor
    difference: Tensor

    @property
    def effect(self) -> Tensor:
        """(S, N, U) indirect effect: how much of the probability comes back."""
        return self.restored - self.p_corrupt

    @property
    def told(self) -> bool:
        """Whether the corruption took away enough to speak of shares."""
        return self.p_clean - self.p_corrupt >= LEAST_FALL

    @property
    def share(self) -> Tensor:
        """(S, N, U) normalised indirect effect: 1 where all of it comes back; NaN where hardly any was taken."""
        fall = self.p_clean - self.p_corrupt
        return self.effect / (fall if self.told else float("nan"))

    @property
    def share_of_logits(self) -> Tensor:
        """(S, N, U) the same of the logit difference between target and rival, which does not saturate."""
        fall = self.difference_clean - self.difference_corrupt
        return (self.difference - self.difference_corrupt) / (fall if fall > 0 else float("nan"))

    @property
    def classes(self) -> tuple[str, ...]:
        """Of each unit, the class that its tokens are of."""
        found = self.asked.classes
        return tuple(found[int(unit[-1])] for unit in self.units)


def trace(mm: MultimodalModel, asked: Asked, corrupt: Corrupt, options: Tracing, target: int | None = None) -> Trace:
    """Trace one question.

    Args:
        mm: The plain model in eval mode.
        asked: The question.
        corrupt: Its corruption, of the same length.
        options: What to put back, and how.
        target: Token to follow; None: what the clean run answers.

    Raises:
        UserError: The model cannot be computed again from the middle (and ``plain`` was not asked for).
    """
    clean = record(mm, asked.inputs, sites=(*options.sites, "residual"))
    with corrupt.applied(mm):
        base = record(mm, corrupt.inputs, sites=("residual",))
    goal = int(clean.logits.argmax()) if target is None else target
    rival = _rival(base.logits[0], goal)
    units = units_of(asked, clean, base, options.image_units)
    read = _Answer(goal, rival)
    run = _Plain(mm, corrupt) if options.plain else _Restarted(mm, base)
    jobs = _shortlisted(mm, corrupt, clean, options, units, read)
    restored = torch.full((len(options.sites), mm.layout.num_layers, len(units), 2), float("nan"), dtype=torch.float64)
    for s, site in enumerate(options.sites):
        for layer in range(mm.layout.num_layers):
            layers = window(layer, options.width, mm.layout.num_layers, options.convention)
            for some in batches(jobs[s][layer], units, asked.length, options.batch_tokens):
                positions = padded([units[u] for u in some])
                logits = run(site, layers, positions, clean)
                restored[s, layer, some] = read(logits)
    (p_clean, d_clean), (p_corrupt, d_corrupt) = (read(run.logits)[0].tolist() for run in (clean, base))
    return Trace(
        asked,
        goal,
        rival,
        options.sites,
        tuple(units),
        p_clean,
        p_corrupt,
        d_clean,
        d_corrupt,
        restored[..., 0],
        restored[..., 1],
    )


@dataclass(frozen=True)
class _Answer:
    """Reads (R, 2) off logits: probability of the target, and its logit minus the rival's."""

    target: int
    rival: int

    def __call__(self, logits_RV: Tensor) -> Tensor:
        logits_RV = logits_RV.double()
        chance = logits_RV.softmax(-1)[:, self.target]
        return torch.stack([chance, logits_RV[:, self.target] - logits_RV[:, self.rival]], 1).cpu()


class _Restarted:
    """Puts clean values back by computing the corrupt run again from there on."""

    def __init__(self, mm: MultimodalModel, base: Recording) -> None:
        self.replay = Replay(mm, base)

    def __call__(self, site: Site, layers: Sequence[int], positions_RP: Tensor, clean: Recording) -> Tensor:
        start = self.replay.start_for(int(positions_RP.min()))
        back = patch(site, layers, positions_RP, clean.values)
        return self.replay.logits([back], variants=len(positions_RP), layer=min(layers), start=start)


class _Plain:
    """Puts clean values back by running the whole model on the corrupt inputs."""

    def __init__(self, mm: MultimodalModel, corrupt: Corrupt) -> None:
        self.mm, self.corrupt = mm, corrupt

    def __call__(self, site: Site, layers: Sequence[int], positions_RP: Tensor, clean: Recording) -> Tensor:
        answers = []
        for positions_P in positions_RP:
            back = patch(site, layers, positions_P, clean.values)
            with self.corrupt.applied(self.mm), intervened(self.mm, [back]):
                answers.append(last_logits(self.mm, self.corrupt.inputs))
        return torch.cat(answers)


def _rival(logits_V: Tensor, target: int) -> int:
    """The corrupt run's answer, or its second where the first is the target."""
    best, second = logits_V.topk(2).indices.tolist()
    return int(second if best == target else best)


def _shortlisted(
    mm: MultimodalModel,
    corrupt: Corrupt,
    clean: Recording,
    options: Tracing,
    units: Sequence[Tensor],
    read: _Answer,
) -> list[list[list[int]]]:
    """Units to compute exactly, by site and layer."""
    every = list(range(len(units)))
    if options.shortlist is None:
        return [[every] * mm.layout.num_layers for _ in options.sites]
    chosen = []
    for site in options.sites:
        guess = attribution(mm, corrupt, clean, site, units, read.target, read.rival).abs()
        best = torch.zeros_like(guess, dtype=torch.bool).flatten()
        best[guess.flatten().topk(min(options.shortlist, guess.numel())).indices] = True
        chosen.append([row.nonzero().flatten().tolist() for row in best.view_as(guess)])
    return chosen
