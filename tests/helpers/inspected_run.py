"""A run that was looked into: 30 layers of which 7 to 14 train, 6 steps, the measures of a usual inspection.

Data flow: formulas and a seed -> the files that such a run writes -> the report.
"""

import math
import random

from lightning_mm.core.io import write_json
from lightning_mm.core.layer_table import LayerRow, append_layers, append_matrix

TOTAL, TRAINED, STEPS = 30, tuple(range(7, 15)), (0, 20, 100, 250, 400, 500)
CONSTANT = "constant: all 240 samples coincide"


def bump(layer, centre, width):
    return math.exp(-(((layer - centre) / width) ** 2))


def moved(layer, share):
    """How far a layer has moved: nothing below the trained layers, more with each of them, and it stays above."""
    return share * min(max(layer - 6, 0), 8) / 8 * (1 - 0.012 * max(layer - 14, 0))


def value_of(measure, site, layer, share):
    """A believable profile, and its chance level, of one measure; ``share`` is how much of the training is done."""
    own = measure.split("/")[0]
    if measure == "entailment/hard":
        return 0.5 + 0.14 * bump(layer, 17, 7) + 0.2 * share * bump(layer, 13, 6) * (layer >= 7), 0.5
    if measure == "entailment/random":
        return 0.5 + 0.3 * bump(layer, 16, 8) + 0.14 * share * bump(layer, 13, 7) * (layer >= 7), 0.5
    if measure.endswith("text_only"):
        return 0.53 + 0.01 * math.sin(layer), 0.5
    if measure.endswith("selectivity"):
        return 0.02 + 0.2 * bump(layer, 15, 7) * (0.6 + 0.4 * share), 0.0
    if own in ("objects", "object_at_patches"):
        return 0.5 + 0.34 * bump(layer, 21, 11) + 0.05 * share * bump(layer, 18, 8), 0.5
    if measure == "overlap":
        return 0.02 + 0.1 * bump(layer, 20, 7) + 0.12 * share * bump(layer, 14, 6) * (layer >= 7), 0.0216
    if measure == "cka":
        return 0.05 + 0.25 * bump(layer, 21, 6) + 0.2 * share * bump(layer, 14, 7) * (layer >= 7), 0.0
    if measure == "gap_auc":
        return 0.99 - 0.2 * bump(layer, 22, 6) - 0.15 * share * bump(layer, 14, 6), 0.5
    if measure == "gap":
        return 1.1 - 0.4 * bump(layer, 22, 6) - 0.2 * share * bump(layer, 14, 6), None
    if measure.startswith("drift_"):
        return 1 - moved(layer, 0.55 * share) * (0.6 if site == "image" else 1.0), None
    return 9 + 9 * bump(layer, 5, 3) + 4 * bump(layer, 17, 5) + 2 * share * bump(layer, 14, 5), None


MEASURES = [
    *[("probing", m, "last") for m in ("entailment/hard", "entailment/random", "objects", "entailment/hard/text_only")],
    *[("probing", m, "last") for m in ("entailment/hard/selectivity", "entailment/random/text_only")],
    ("probing", "object_at_patches", "object"),
    *[("geometry", m, site) for m in ("overlap", "cka", "gap", "gap_auc") for site in ("last", "image~text")],
    *[("geometry", m, site) for m in ("id_gride", "participation_ratio") for site in ("picture", "image", "text")],
    *[("drift", m, site) for m in ("drift_overlap", "drift_cka") for site in ("picture", "image", "text")],
    ("geometry", "my_own_measure", "picture"),
]


def rows_of(step, measures=MEASURES, seed=0, steps=STEPS):
    """All rows of one inspection."""
    share = (1 - math.exp(-3 * step / steps[-1])) / (1 - math.exp(-3)) if steps[-1] else 0.0
    rows = []
    for analysis, measure, site in measures:
        draw = random.Random(f"{seed}/{step}/{measure}/{site}")
        noise = 0.0 if analysis == "drift" else 0.012
        for layer in range(-1, TOTAL):
            if layer == -1 and site in ("last", "picture", "text"):
                rows.append(LayerRow(step, analysis, measure, site, layer, n=240, undefined=CONSTANT))
                continue
            value, null = value_of(measure, site, layer, share)
            value += noise * draw.gauss(0, 1) * (20 if null is None and analysis == "geometry" else 1)
            half = 0.06 * (10 if null is None and analysis == "geometry" else 1) * (0.3 if "drift" in measure else 1)
            top = 1.0 if null is not None or analysis == "drift" else math.inf
            value = min(value, top)
            near = {} if null is None else {"null": null, "null_low": null - 0.045, "null_high": null + 0.045}
            ends = {"low": value - half, "high": min(value + half, top)}
            note = ("3 duplicates were left out",) if measure == "overlap" else ()
            k = 10 if "overlap" in measure else None
            rows.append(LayerRow(step, analysis, measure, site, layer, value, **ends, **near, n=240, k=k, notes=note))
    return rows


def matrix_of(step):
    """CKA of every layer with every other: three blocks of layers, and the trained one stands out more."""
    share = step / STEPS[-1]

    def likeness(a, b):
        stage = abs((a > 6) - (b > 6)) + abs((a > 20) - (b > 20))
        return math.exp(-abs(a - b) / 18) * (1 - (0.15 + 0.25 * share) * stage)

    layers = range(-1, TOTAL)
    return [[math.nan if -1 in (a, b) else likeness(a, b) for b in layers] for a in layers]


def look_into(run, steps=STEPS, measures=MEASURES):
    """Write what an inspection of a run writes."""
    for step in steps:
        append_layers(run.layers, rows_of(step, measures, steps=steps))
        append_matrix(run, step, "cka", "picture", range(-1, TOTAL), matrix_of(step))
        append_matrix(run, step, "cka", "last", range(-1, TOTAL), matrix_of(step))
    tasks = {
        name: {"rows": 480, "images": 240} for name in ("entailment/hard", "entailment/random", "objects", "pairs")
    }
    told = {"hash": "9f1c7e02d4ab", "seed": 0, "source": "nano/data/probes.json", "rows": 1440, "images": 240}
    write_json(run.probes, told | {"tasks": tasks})
    seconds = {"forward": 3.2, "analyses": 4.1}
    write_json(run.inspections, [{"step": step, "seconds": seconds, "share": 0.032, "problems": []} for step in steps])
    return run


def choose(run, evidence=True):
    """Write what ``layers: auto`` writes."""
    score = [0.2 + bump(layer, 11, 6) for layer in range(TOTAL)]
    criteria = {
        "overlap": [bump(layer, 13, 6) for layer in range(TOTAL)],
        "imbalance": [bump(layer, 12, 8) + 0.05 * math.sin(3 * layer) for layer in range(TOTAL)],
        "entailment": [0.5 + 0.3 * bump(layer, 14, 5) for layer in range(TOTAL)],
        "dimension": [None, *[bump(layer, 6, 4) + 0.4 * bump(layer, 17, 4) for layer in range(1, TOTAL)]],
        "rgn": [math.exp(-layer / 12) for layer in range(TOTAL)],
    }
    told = {"layers": list(TRAINED), "expression": "7-14", "first_range": [6, 8], "last_range": [13, 16]}
    told |= {"score": score, "score_low": [s - 0.15 for s in score], "score_high": [s + 0.15 for s in score]}
    rivals = {"EarlyLayers": "0-7", "LateLayers": "22-29", "UniformSparse": "0, 4, 8, 12, 16, 20, 24, 29"}
    why = ["captions and pictures share 14 % of their neighbours, chance 2 %", "a step costs 58% of full tuning's"]
    write_json(run.selection, told | {"criteria": criteria, "controls": rivals, "evidence": evidence, "why": why})
    return run


def write_census(run):
    """A census of the model whose layers 7 to 14 train."""
    row = {"mode": "frozen", "parameters": 100, "trainable": 0, "dtype": "float32", "training": False}
    moving = row | {"mode": "full", "trainable": 100, "training": True, "lr": 2e-4, "weight_decay": 0.01}
    regions = [("vision", row), ("connector", row), ("layers 0-6", row), ("layers 7-14", moving), ("layers 15-29", row)]
    census = {"digest": "d1", "policy": "IntermediateOnly(layers='25%-50%')", "total_parameters": 600}
    census |= {"layers": {"expression": "7-14", "trained": list(TRAINED), "total": TOTAL}, "trainable_parameters": 100}
    write_json(
        run.census, census | {"rows": [r | {"region": name} for name, r in [*regions, ("norm", row), ("head", row)]]}
    )
    return run
