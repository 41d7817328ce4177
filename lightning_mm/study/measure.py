"""Measures one model of a study on all axes, and writes its small files.

Data flow: module -> questions (own, other and gray pictures; facts), text, layers -> answers.csv.gz, layers.csv.gz, and
last result.json, which makes the job complete.
"""

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_mm.core.decisions import log
from lightning_mm.core.io import write_json
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.study.answers import ask, first_tokens, test_data
from lightning_mm.study.folder import Job, StudyFolder, write_layers, write_table
from lightning_mm.study.inputs import Asked, question_files, read_choices, read_text, write_choices
from lightning_mm.study.layers import read_layers
from lightning_mm.study.opened import Reader
from lightning_mm.study.retention import text_nats
from lightning_mm.study.settings import START, StudySettings
from lightning_mm.training.module import MMModule
from lightning_mm.tuning.layers import describe_layers

Moment = Literal["end", "equal_cost"]
"""When a model is measured: after all steps, or where it has cost as much as the main arm has at its end."""
ANSWERS = ("moment", "shown", "test", "question", "exact", "choice", "nats")


@dataclass(frozen=True)
class Measured:
    """What was measured of a model at one moment.

    Args:
        rows: Of answers.csv.gz.
        text: Nats per token of each passage; empty where no text is read.
    """

    rows: list[tuple[object, ...]]
    text: list[float]


class Measuring:
    """Measures the models of one study.

    Args:
        folder: The study's folder, with its inputs.
        settings: The study.
        reader: How models are read.
    """

    def __init__(self, folder: StudyFolder, settings: StudySettings, reader: Reader) -> None:
        self.folder, self.settings, self.reader = folder, settings, reader

    def at(self, moment: Moment, module: MMModule) -> Measured:
        """Ask all questions and read the text.

        Args:
            module: The model, in eval mode.
            moment: When it is measured; at equal cost, only with each question's own picture.
        """
        rows: list[tuple[object, ...]] = []
        device = module.mm.device
        for asked in question_files(self.folder, self.settings, blind=moment == "end"):
            began = time.perf_counter()
            data = test_data(self.reader.data, asked, self.settings.eval_batch_size)
            answers = ask(module, data, self._choices(asked), self.reader.autocast(device))
            rows += [
                (moment, asked.shown, asked.test, a.question, int(a.exact), _flag(a.choice), f"{a.nats:.4f}")
                for a in answers
            ]
            share = sum(answer.exact for answer in answers) / len(answers)
            took = time.perf_counter() - began
            log.info("%s, %s picture: %.1f %% of %d, %.0f s", asked.test, asked.shown, 100 * share, len(answers), took)
        return Measured(rows, self._text(module))

    def layers(self, job: Job, module: MMModule, start: MMModule | None) -> list[str]:
        """Read every layer into layers.csv.gz; returns what could not be measured.

        Args:
            job: Whose model it is.
            module: The model.
            start: The model that it began from; None: it is that model.
        """
        options = self.settings.layers
        if options.probes is None or (job.arm != START and options.arms is not None and job.arm not in options.arms):
            return []
        kept = RunDirectory(self.folder.of_job(Job(START, job.seed)))
        found = read_layers(module, start, self.reader, options, kept)
        write_layers(self.folder.results(job) / "layers.csv.gz", found.rows)
        return found.problems

    def write(self, job: Job, measured: Mapping[Moment, Measured], facts: Mapping[str, Any]) -> None:
        """Write the answers, and last the result, with which the job is complete.

        Args:
            job: Whose model it is.
            measured: By moment.
            facts: What else is known of it.
        """
        place = self.folder.results(job)
        place.mkdir(parents=True, exist_ok=True)
        write_table(place / "answers.csv.gz", ANSWERS, [row for each in measured.values() for row in each.rows])
        text = {moment: [round(value, 5) for value in each.text] for moment, each in measured.items()}
        result = {"arm": job.arm, "seed": job.seed, **facts, "text": text, "machine": machine()}
        write_json(self.folder.result(job), result)

    def _text(self, module: MMModule) -> list[float]:
        settings = self.settings
        if settings.text is None:
            return []
        autocast = self.reader.autocast(module.mm.device)
        return text_nats(module, read_text(self.folder), settings.text_chunks, settings.text_tokens, autocast)

    def _choices(self, asked: Asked) -> dict[str, dict[str, int]]:
        known = read_choices(self.folder, asked.test)
        if known is None:
            own = Asked(asked.test, "own", self.folder.inputs / f"{asked.test}.own.json")
            known = first_tokens(test_data(self.reader.data, own, self.settings.eval_batch_size))
            write_choices(self.folder, asked.test, known)
        return known


def trained_facts(module: MMModule) -> dict[str, Any]:
    """Which weights of a model train."""
    return {
        "policy": module.census.policy,
        "layers": list(module.plan.layers),
        "layers_named": describe_layers(module.plan.layers),
        "num_layers": module.plan.num_layers,
        "trained_weights": module.census.trainable,
        "weights": module.census.total,
    }


def machine() -> dict[str, Any]:
    """What it was measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "gpu": gpu,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8", errors="replace").splitlines() if cpu.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _flag(value: bool | None) -> str:
    return "" if value is None else str(int(value))
