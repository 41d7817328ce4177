"""A study of seconds on a tiny model, and one whose results are planted."""

import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_mm.core.io import write_json
from lightning_mm.core.layer_table import LayerRow
from lightning_mm.study.folder import Job, StudyFolder, write_layers, write_table
from lightning_mm.study.settings import read_settings
from tests.helpers.data import make_probe_rows, make_rows

COLORS = ("red", "green", "blue")


def make_questions(folder: Path, pictures: int) -> Path:
    """Two questions about each picture, of which no two have the same size."""
    generator = random.Random(3)
    rows = []
    for number in range(pictures):
        color = generator.choice(COLORS)
        Image.new("RGB", (40, 36 + number), color).save(folder / f"asked-{number}.png")
        for text, answer, kind in (
            ("What colour is it?", color, "colour"),
            ("Is it red?", "yes" if color == "red" else "no", "yes_no"),
        ):
            rows.append(_row(f"{number}-{kind}", f"<image>\n{text}", answer, kind, image=f"asked-{number}.png"))
    file = folder / "test.json"
    file.write_text(json.dumps(rows))
    return file


def make_facts(folder: Path, count: int) -> Path:
    """Questions without pictures."""
    file = folder / "facts.json"
    file.write_text(json.dumps([_row(str(n), f"What is {n}?", "a number", "fact") for n in range(count)]))
    return file


def make_study(folder: Path, model: Path) -> dict[str, Any]:
    """Options of a study, with its files under a folder."""
    folder.mkdir(exist_ok=True)
    train = folder / "train.json"
    train.write_text(json.dumps(make_rows(folder, 24)))
    probes = make_probe_rows(folder / "probes", 24)
    options = {
        "trainer.accelerator": "cpu",
        "data.train": str(train),
        "data.num_workers": 0,
        "data.batch_size": 2,
        "data.max_length": 256,
    }
    return {
        "model": str(model),
        "options": options,
        "stage1": {"steps": 3},
        "stage2": {"steps": 6},
        "lr": 0.01,
        "connector_lr": 0.01,
        "arms": {
            "connector": {"tuning": "ConnectorOnly"},
            "middle": {"tuning": "IntermediateOnly", "options": {"layers": "1"}},
            "full": {"tuning": "Full", "lr": 0.02},
        },
        "seeds": [0, 1],
        "tests": {"test": str(make_questions(folder, 8))},
        "facts": str(make_facts(folder, 4)),
        "text_chunks": 4,
        "text_tokens": 16,
        "layers": {"probes": str(probes), "images": 24, "measures": ["overlap", "gap"], "arms": ["middle"]},
        "save_every": 2,
    }


def _row(name: str, question: str, answer: str, kind: str, **more: str) -> dict[str, Any]:
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer, "type": kind}]
    return {"id": name, "conversations": talk, **more}


ARMS = ("stage1", "connector", "middle", "early", "late", "full", "auto")
"""Arms of a planted study."""


def plant_study(
    folder: Path,
    shares: dict[str, float],
    *,
    seeds: int = 3,
    pictures: int = 250,
    text: dict[str, float] | None = None,
    peak: int = 6,
    causal_peak: int = 6,
) -> Path:
    """Write the small files of a study whose arms answer with these shares; pictures and seeds add noise to all.

    Args:
        folder: To write to.
        shares: Arm -> share of the questions that it answers exactly; 0.45 for those that are not named.
        seeds: How many.
        pictures: With four questions each.
        text: Arm -> nats of text that it has lost; 0 for those that are not named.
        peak: Layer where the probes peak, of 12.
        causal_peak: Layer whose ablation costs most.
    """
    arms = {
        "connector": {"tuning": "ConnectorOnly"},
        "middle": {"tuning": "IntermediateOnly"},
        "early": {"tuning": "EarlyLayers"},
        "late": {"tuning": "LateLayers"},
        "full": {"tuning": "Full"},
        "auto": {"tuning": "IntermediateOnly", "options": {"layers": "auto"}},
    }
    settings = read_settings(
        {
            "model": "m",
            "stage1": {"steps": 400},
            "stage2": {"steps": 300},
            "tests": {"known": "k.json"},
            "arms": arms,
            "seeds": list(range(seeds)),
            "resamples": 500,
        }
    )
    study = StudyFolder(folder)
    study.open(settings)
    kinds = ("colour", "count", "category", "side")
    answers = ("red", "two", "food", "left")
    asked = [(f"{4 * p + k}.0", p, kinds[k], answers[k]) for p in range(pictures) for k in range(4)]
    rows: list[tuple[object, ...]] = [("known", name, name, p, kind, a) for name, p, kind, a in asked]
    rows += [("facts", f"{n}.0", str(n), f"row{n}", "fact", "Paris") for n in range(60)]
    write_table(study.questions, ("test", "question", "id", "picture", "type", "answer"), rows)
    generator = random.Random(7)
    ease = [generator.gauss(0, 0.6) for _ in range(pictures)]
    for seed in range(seeds):
        for arm in ARMS:
            _plant(study, Job(arm, seed), asked, ease, shares.get(arm, 0.45), (text or {}).get(arm, 0.0), generator)
            _plant_layers(study, Job(arm, seed), peak, causal_peak)
    return folder


def _plant(
    study: StudyFolder,
    job: Job,
    asked: list[tuple[str, int, str, str]],
    ease: list[float],
    share: float,
    lost: float,
    generator: random.Random,
) -> None:
    level = math.log(share / (1 - share))
    rows: list[tuple[object, ...]] = []
    for shown in ("own", "other", "gray"):
        for name, picture, _, _ in asked:
            chance = 1 / (1 + math.exp(-(level + ease[picture]))) if shown == "own" else 0.2
            rows.append(("end", shown, "known", name, int(generator.random() < chance), "", f"{-math.log(chance):.4f}"))
    rows += [("end", "own", "facts", f"{n}.0", int(n % 5 < 2), "", "1.0") for n in range(60)]
    place = study.results(job)
    write_table(place / "answers.csv.gz", ("moment", "shown", "test", "question", "exact", "choice", "nats"), rows)
    flops = {"full": 5e11, "middle": 3e11}.get(job.arm, 4e11)
    nats = [3.3 + 0.1 * math.sin(n) + lost for n in range(64)]
    result = {
        "arm": job.arm,
        "seed": job.seed,
        "layers_named": {"middle": "3-5", "auto": "4-7"}.get(job.arm, "0-11"),
        "trained_weights": 1_000_000,
        "steps": 300,
        "seconds_per_step": flops / 3e11,
        "flops_per_step": None if job.arm == "stage1" else flops,
        "equal_step": None,
        "text": {"end": nats},
        "machine": {"gpu": "", "processor": "a processor", "threads": 2, "torch": "2.13"},
    }
    write_json(study.result(job), result)


def _plant_layers(study: StudyFolder, job: Job, peak: int, causal_peak: int) -> None:
    rows, causes = [], []
    for layer in range(12):
        height = math.exp(-((layer - peak) ** 2) / 8)
        for measure, site in (("entailment/hard", "last"), ("objects", "image"), ("overlap", "last")):
            value = 0.5 + 0.3 * height
            band = {"low": value - 0.05, "high": value + 0.05, "null": 0.5, "null_low": 0.45, "null_high": 0.55}
            rows.append(LayerRow(0, "probing", measure, site, layer, value, n=96, **band))
        lost = -math.exp(-((layer - causal_peak) ** 2) / 8)
        causes.append(LayerRow(0, "causal", "ablation", "skip", layer, lost, low=lost - 0.1, high=lost + 0.1, null=0.0))
    write_layers(study.results(job) / "layers.csv.gz", rows)
    if job.arm in ("stage1", "middle"):
        write_layers(study.results(job) / "causes.csv.gz", causes)
