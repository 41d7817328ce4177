"""Cases of a study's comparisons (arms over seeds on the same questions) and of curves over layers that agree.

Data flow: scores by arm, seed and question -> ``study.statistics`` -> each difference alone, all together, levels;
two smooth curves -> the p-value of their agreement.
"""

from functools import partial

import torch
from torch import Tensor

from calibration_cases.case import Case, Outcome, Reading
from calibration_cases.made_up import smooth_noise
from lightning_mm.study.statistics import contrasts, levels, smooth_p_value

_ARMS, _PER_PICTURE = 9, 4
_PICTURES = {96: 24, 1000: 250}
_RESTS_ON = ("study/statistics.py",)
_RESAMPLES = 1000
_LAYERS = 31


def draw(seed: int, questions: int, seeds: int, effect: float) -> tuple[Tensor, Tensor, float]:
    """(A, S, Q) 0 or 1 of every answer, (Q,) pictures, and the true difference of the last arm to every other.

    Pictures and questions are easier or harder, some for one arm more than for others, and so are seeds, where there
    are several: the interval of one seed is that of the pictures alone.
    """
    generator = torch.Generator().manual_seed(seed)
    picture_Q = torch.arange(questions) // _PER_PICTURE
    num_pictures = int(picture_Q.max()) + 1
    ease = 0.5 * torch.randn(1, 1, num_pictures, generator=generator)[..., picture_Q]
    ease = ease + 0.3 * torch.randn(_ARMS, 1, num_pictures, generator=generator)[..., picture_Q]
    between_seeds = 0.1 if seeds > 1 else 0.0
    ease = ease + between_seeds * torch.randn(_ARMS, seeds, 1, generator=generator)
    noise = torch.randn(_ARMS, seeds, questions, generator=generator)
    ease[-1] += effect
    spread = (1 + 0.5**2 + 0.3**2 + between_seeds**2) ** 0.5
    normal = torch.distributions.Normal(0.0, 1.0)
    true = float(normal.cdf(torch.tensor(effect / spread)) - 0.5)
    return (ease + noise > 0).double(), picture_Q, true


def measure(drawn: tuple[Tensor, Tensor, float], effect: float) -> Outcome:
    """The last arm against all others: one difference, all of them, and the level of the first arm."""
    scores_ASQ, picture_Q, true = drawn
    names = [f"arm {number}" for number in range(_ARMS)]
    pairs = [(names[-1], other) for other in names[:-1]]
    found = contrasts(scores_ASQ, picture_Q, names, pairs, _RESAMPLES)
    first = found[0]
    level = levels(scores_ASQ, picture_Q, _RESAMPLES)[0]
    # All of them hold where the one that is furthest off does.
    worst = max(found, key=lambda one: abs(one.value - true) / max(one.corrected_high - one.value, 1e-12))
    is_found = first.is_higher if effect else any(one.is_higher or one.is_lower for one in found)
    return Outcome(
        [
            Reading("one difference", first.value, first.low, first.high, truth=true),
            Reading("all differences together", worst.value, worst.corrected_low, worst.corrected_high, truth=true),
            Reading("higher or lower, corrected", found=is_found),
            Reading("level of an arm", level.value, level.low, level.high, truth=0.5),
        ]
    )


def draw_curves(seed: int, share: float) -> tuple[list[float], list[float]]:
    """Two curves over layers, as smooth as autoregressive ones, that have this share of their variance in common."""
    one, two = smooth_noise((_LAYERS, 2), torch.Generator().manual_seed(seed)).T
    return one.tolist(), (share**0.5 * one + (1 - share) ** 0.5 * two).tolist()


def measure_curves(drawn: tuple[list[float], list[float]]) -> Outcome:
    """Whether they are called related at 5 %, for one pair of curves."""
    return Outcome([Reading("curves that agree, p <= 5 %", found=smooth_p_value(*drawn, draws=1000) <= 0.05)])


def cases() -> list[Case]:
    """All of them."""
    made = []
    for questions in (96, 1000):
        for seeds in (1, 3):
            for kind, effect in (("null", 0.0), ("planted", 0.5 if questions < 1000 else 0.25)):
                about = (
                    f"{_ARMS} arms, {seeds} seeds, {questions} questions, {_PER_PICTURE} a picture; one arm against "
                    f"all others, {effect} of a question's spread better"
                )
                drawn = partial(draw, questions=questions, seeds=seeds, effect=effect)
                name = f"study/{questions}/{seeds} seeds/{kind}"
                made.append(Case(name, about, drawn, partial(measure, effect=effect), _RESTS_ON))
    for kind, share in (("null", 0.0), ("planted", 0.7)):
        about = f"two curves over {_LAYERS} layers, neighbors alike to 0.9, {share:.0%} of their variance in common"
        drawn = partial(draw_curves, share=share)
        made.append(Case(f"curves/{_LAYERS}/smooth/{kind}", about, drawn, measure_curves, _RESTS_ON))
    return made
