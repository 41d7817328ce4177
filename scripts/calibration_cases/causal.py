"""Cases of causal effects averaged over questions: traces whose effects differ by question and by picture.

Other effects (knockout, ablation, attention, edits) are means over questions by the same function.

Data flow: probabilities of made-up traces -> ``causal.effects.aggregate`` -> means of ratios and of effects.
"""

from functools import partial
from typing import Any

import torch

from calibration_cases.case import Case, Outcome, reading_of
from calibration_cases.made_up import groups_of
from lightning_mm.analysis.findings import Findings
from lightning_mm.causal.effects.activation_patching import CausalTrace
from lightning_mm.causal.effects.aggregate import average_traces
from lightning_mm.causal.questions.question import EncodedQuestion, Question

_RESTS_ON = ("causal/effects/aggregate.py", "causal/effects/activation_patching.py", "geometry/resampling.py")
_TOKENS = 3


def draw(seed: int, questions: int, grouped: bool, share: float) -> list[CausalTrace]:
    """Traces of one site in one layer; ``share`` of the fall comes back, more for some pictures than for others."""
    generator = torch.Generator().manual_seed(seed)
    groups = groups_of(questions, (2, 3, 4) if grouped else (1,))

    def normal(spread: float) -> Any:
        own = torch.randn(questions, generator=generator)
        common = torch.randn(int(groups.max()) + 1, generator=generator)[groups] if grouped else 0.0
        return spread * (0.8**0.5 * common + (0.2 if grouped else 1.0) ** 0.5 * own)

    clean = torch.sigmoid(1 + normal(1.0))
    corrupt = clean * torch.sigmoid(-1 + normal(1.0))
    restored = corrupt + (clean - corrupt) * (share + normal(0.2)) + normal(0.03)
    return [
        _trace(number, int(group), *(float(each) for each in numbers))
        for number, (group, *numbers) in enumerate(zip(groups, clean, corrupt, restored, strict=True))
    ]


def _trace(number: int, group: int, clean: float, corrupt: float, restored: float) -> CausalTrace:
    question = Question(str(number), "what?", (), (), group=f"picture {group}")
    positions = torch.arange(_TOKENS)
    encoded = EncodedQuestion(question, {}, ("",) * _TOKENS, positions[:0], (positions[:1],), positions[:1])
    return CausalTrace(
        encoded=encoded,
        target=0,
        rival=1,
        sites=("mlp",),
        units=(positions[:1],),
        p_clean=clean,
        p_corrupt=corrupt,
        logit_difference_clean=clean - corrupt,
        logit_difference_corrupt=0.0,
        restored=torch.full((1, 1, 1), restored),
        logit_difference=torch.full((1, 1, 1), restored - corrupt),
    )


def measure(traces: list[CausalTrace]) -> Outcome:
    """Every mean that a trace gives."""
    found = Findings(0)
    for name, site, estimates in average_traces(traces):
        found.add("causal", name, site, estimates, first=0)
    return Outcome([reading_of(row) for row in found.rows])


def cases() -> list[Case]:
    """All of them."""
    made = []
    for questions in (40, 1000):
        for grouped in (False, True):
            for kind, share in (("null", 0.0), ("planted", 0.1)):
                words = "2 to 4 about a picture" if grouped else "one about a picture"
                about = f"{questions} questions, {words}; {share:.0%} of the fall of the probability comes back"
                name = f"causal means/{questions}/{'groups' if grouped else 'alone'}/{kind}"
                drawn = partial(draw, questions=questions, grouped=grouped, share=share)
                made.append(Case(name, about, drawn, measure, _RESTS_ON))
    return made
