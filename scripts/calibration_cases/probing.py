"""Cases of the probes: accuracy (entailment, with true and false rows of a picture), AUROC (objects), and their peaks.

Entailment as the nano data have it: two pictures exchange their captions, so that a group has four rows, and each
caption is true in one row and false in another. All 31 layers are alike to 0.9 to the next, as those of a model are.

Data flow: features of 31 layers with a bump of signal, or none -> ``analysis.probing.run_probes`` ->
``analysis.summary`` -> readings of one layer, and of the peak.
"""

from functools import partial

import torch

from calibration_cases.case import Case, Outcome, reading_of
from calibration_cases.made_up import WIDTH, States, cloud, groups_of, smooth_noise, states_of
from calibration_cases.peaks import BUMP_L, LAYERS, PEAK, peak_readings
from lightning_mm.analysis.probing import ProbingOptions, run_probes

_LABELS = 4
_CPU = torch.device("cpu")
_RESTS_ON = ("probes", "analysis/probing.py", "analysis/summary.py", "report/sections/layers.py")


def draw_entailment(seed: int, rows: int, strength: float, layers: int = LAYERS, picture: float = 0.5) -> States:
    """Two rows per picture, four per group.

    Args:
        seed: Of the draw.
        rows: Number of rows, a multiple of 4.
        strength: Shift of true rows against false ones at the peak, in standard deviations.
        layers: T.
        picture: Share of the variance that the rows of a picture have in common; the captions have as much of the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    pictures, truth = torch.arange(rows) // 2, torch.arange(rows) % 2
    captions = torch.where(truth == 1, pictures, pictures ^ 1)
    parts = [smooth_noise((layers, rows // 2, WIDTH), generator)[:, of] for of in (pictures, captions)]
    own = smooth_noise((layers, rows, WIDTH), generator)
    x = (picture / 2) ** 0.5 * (parts[0] + parts[1]) + (1 - picture) ** 0.5 * own
    x = x + strength * _bump(layers)[:, None, None] * _direction(0) * (truth[:, None] - 0.5)
    labels = [{"entailment/random": int(each)} for each in truth]
    words = [f"caption {int(each)}" for each in captions]
    return states_of({"entailment/last": x}, {"entailment": pictures // 2}, {"entailment": labels}, words)


def draw_objects(seed: int, rows: int, grouped: bool, strength: float, layers: int = LAYERS) -> States:
    """Pictures with some of four kinds of object, and with a number of things; groups share most of what they show."""
    generator = torch.Generator().manual_seed(seed)
    groups = groups_of(rows, (2, 3, 4) if grouped else (1,))
    num_groups = int(groups.max()) + 1
    shown = torch.rand(num_groups, _LABELS, generator=generator)[groups] < 0.4
    count = torch.randint(3, (num_groups,), generator=generator)[groups]
    x = cloud(groups, layers, generator)
    signal = sum(_direction(1 + label) * shown[:, label, None] for label in range(_LABELS))
    signal = signal + _direction(9) * count[:, None]
    x = x + strength * _bump(layers)[:, None, None] * signal
    pairs = zip(shown.long().tolist(), count.tolist(), strict=True)
    labels = [{"objects": tuple(holds), "count": number} for holds, number in pairs]
    return states_of({"picture/last": x}, {"picture": groups}, {"picture": labels})


def _bump(layers: int) -> torch.Tensor:
    return BUMP_L if layers == LAYERS else torch.ones(layers)


def _direction(number: int) -> torch.Tensor:
    """(D,) a fixed unit vector."""
    return torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(number)), dim=0)


def measure(drawn: States, options: ProbingOptions, planted: bool) -> Outcome:
    """All probes that there are labels for: one layer, chosen beforehand, and the peak over the layers."""
    found = run_probes(drawn.states, None, drawn.probe_set, options, _CPU)
    assert found.rows, found.problems
    readings, profiles = [], {}
    for name, site in dict.fromkeys((row.measure, row.site) for row in found.rows):
        profile = found.profile(name, site)
        layer = min(PEAK, len(profile) - 1) - 1
        readings.append(reading_of(profile[layer]))
        if len(profile) == LAYERS:
            profiles[name] = [profile[layer].value for layer in sorted(profile)]
            readings += peak_readings(found, name, site, planted)
    return Outcome(readings, profiles)


def cases() -> list[Case]:
    """All of them."""
    made = []
    plain, extra = ProbingOptions(), ProbingOptions(selectivity=True, compression=True)
    for rows, part in ((96, "cross-fitted"), (1000, "cross-fitted"), (1600, "one test part")):
        for kind in ("null", "planted"):
            planted, small = kind == "planted", rows < 1000
            how = partial(measure, options=plain, planted=planted)
            strength = {96: 1.2, 1000: 0.4, 1600: 0.6}[rows] if planted else 0.0
            words = f"{LAYERS} layers of {WIDTH} features, {part}; "
            said = (
                f"true and false rows {strength} standard deviations apart at layer {PEAK}" if planted else "no signal"
            )
            for share in (0.0, 0.5, 0.9) if small else (0.5,):
                about = (
                    f"{rows} rows, 4 in a group, pictures and captions are {share:.0%} of the variance, {words}{said}"
                )
                drawn = partial(draw_entailment, rows=rows, strength=strength, picture=share)
                made.append(
                    Case(f"entailment/{rows}/pictures {share:.0%}/{kind}", about, drawn, how, _RESTS_ON, is_small=small)
                )
            for grouped in (False, True):
                words_ = "in groups of 2 to 4" if grouped else "all independent"
                strength = {96: 1.2, 1000: 0.5, 1600: 0.5}[rows] if planted else 0.0
                about = f"{rows} pictures {words_}, {_LABELS} labels and 3 counts, {words}signal {strength}"
                drawn = partial(draw_objects, rows=rows, grouped=grouped, strength=strength)
                name = f"objects/{rows}/{'groups' if grouped else 'alone'}/{kind}"
                made.append(Case(name, about, drawn, how, _RESTS_ON, is_small=small))
    for kind, strength in (("null", 0.0), ("planted", 1.2)):
        drawn = partial(draw_entailment, rows=96, strength=strength, layers=1)
        about = f"96 rows, 4 in a group, one layer, signal {strength}"
        how = partial(measure, options=extra, planted=False)
        made.append(Case(f"selectivity/96/pictures 50%/{kind}", about, drawn, how, _RESTS_ON))
    return made
