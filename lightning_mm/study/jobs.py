"""One job of a study from its beginning to its result.json: the first stage of a seed, or one arm of it.

Every part that was done by an earlier process is taken over: a fit goes on from its last.ckpt, an export that is there
is used, and only what was measured is measured again if result.json is not yet written.

Data flow: job -> (layers chosen) -> fit -> model -> ``Measuring`` -> the job's small files; then its checkpoints are
removed.
"""

import gc
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_mm.core.decisions import log, log_decision
from lightning_mm.core.io import read_json, write_json
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.study import causes, fits
from lightning_mm.study.folder import Job, StudyFolder
from lightning_mm.study.inputs import prepare_inputs
from lightning_mm.study.measure import Measured, Measuring, Moment, trained_facts
from lightning_mm.study.opened import Reader, open_run, open_start
from lightning_mm.study.settings import START, Arm, StudySettings
from lightning_mm.training.module import MMModule
from lightning_mm.verbs.export_model import export_model
from lightning_mm.verbs.select_layers import select_layers

_NEARLY_ALL = 0.98
"""From this share of the steps on, the model at equal cost is the one at the end."""


class StudyJobs:
    """Does the jobs of one study.

    Args:
        folder: The study's folder, opened.
        settings: The study.
    """

    def __init__(self, folder: StudyFolder, settings: StudySettings) -> None:
        self.folder, self.settings = folder, settings
        self._measuring: Measuring | None = None

    def do(self, job: Job) -> None:
        """Do all of a job that is not done."""
        began = time.perf_counter()
        log.info("== %s", job)
        if job.arm == START:
            self._start(job)
        else:
            self._arm(job)
        log.info("== %s: done in %.0f s", job, time.perf_counter() - began)

    @property
    def config(self) -> Path:
        """All options of a fit of the second stage."""
        return self.folder.work / "config.yaml"

    def measuring(self, seed: int) -> Measuring:
        """What measures, with the study's inputs; made on first use."""
        if self._measuring is None:
            content = fits.base_config(self.folder, self.settings)
            reader = Reader.of(self.config, content, self.folder.start(self.settings, seed))
            prepare_inputs(self.folder, self.settings, reader.data)
            self._measuring = Measuring(self.folder, self.settings, reader)
        return self._measuring

    def _start(self, job: Job) -> None:
        """The first stage of a seed, exported and measured."""
        facts: dict[str, Any] = {"steps": 0}
        model = Path(self.folder.start(self.settings, job.seed))
        if self.settings.stage1 is not None:
            plan = fits.first_stage(self.settings, job.seed)
            run = fits.run_fit(self.folder, self.settings, plan)
            facts = {"steps": plan.stage.steps, **_step_facts(run)}
            if not model.is_dir():
                export_model(run.path, model, verify=False)
        measuring = self.measuring(job.seed)
        began = time.perf_counter()
        module = open_start(str(model), self.config)
        measured: dict[Moment, Measured] = {"end": measuring.at("end", module)}
        problems = measuring.layers(job, module, None)
        del module
        gc.collect()
        problems += causes.find(self.folder, self.settings, job, str(model), None)
        facts |= {"measuring_seconds": round(time.perf_counter() - began, 1), "problems": problems}
        measuring.write(job, measured, facts)
        self._tidy(job)

    def _arm(self, job: Job) -> None:
        """One arm of a seed: trained and measured."""
        plan = fits.plan_of(self.folder, self.settings, job, self._with_layers(job))
        decided = self._decided(job, plan)
        plan = replace(plan, equal_step=decided["equal_step"])
        run = fits.run_fit(self.folder, self.settings, plan)
        measuring = self.measuring(job.seed)
        began = time.perf_counter()
        module = open_run(run, run.checkpoints / "last.ckpt")
        measured: dict[Moment, Measured] = {"end": measuring.at("end", module)}
        start = open_start(plan.model, self.config)
        problems = measuring.layers(job, module, start)
        facts = {**trained_facts(module), "steps": plan.stage.steps, **_step_facts(run), **decided}
        del module, start
        gc.collect()
        earlier = fits.equal_cost_checkpoint(self.folder.of_job(job))
        if plan.equal_step is not None and earlier is not None:
            measured["equal_cost"] = measuring.at("equal_cost", self._earlier(run, earlier))
        if job.arm == self.settings.roles.main:
            problems += causes.find(self.folder, self.settings, job, str(run.path), plan.model)
        facts |= {"measuring_seconds": round(time.perf_counter() - began, 1), "problems": problems}
        measuring.write(job, measured, facts)
        self._tidy(job)

    def _earlier(self, run: RunDirectory, checkpoint: Path) -> MMModule:
        return open_run(RunDirectory(checkpoint.parent.parent) if run.config.is_file() else run, checkpoint)

    def _with_layers(self, job: Job) -> Arm:
        """The arm with the layers written out, where it says ``auto``; chosen once, and kept."""
        arm = self.settings.arms[job.arm]
        spec = str(arm.options.get("layers", ""))
        if not spec.startswith("auto"):
            return arm
        file = self.folder.of_job(job) / "selection.json"
        if not file.is_file():
            model = self.folder.start(self.settings, job.seed)
            data = self.measuring(job.seed).reader.data
            probes = self.settings.layers.probes or data.arguments["probes"]
            own = MMDataModule(**{**data.arguments, "val": None, "test": None, "predict": None, "seed": job.seed})
            _, _, budget = spec.partition(":")
            bf16 = self.measuring(job.seed).reader.precision.startswith("bf16")
            chosen = select_layers(model, own, probes=probes, budget=budget or None, bf16=bf16)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, chosen.to_dict())
            gc.collect()
        found = read_json(file)
        return replace(arm, options={**arm.options, "layers": found["layers"]})

    def _decided(self, job: Job, plan: fits.FitPlan) -> dict[str, Any]:
        """FLOPs of a step of this arm and of the main one, and the step of equal cost; decided once."""
        file = self.folder.of_job(job) / "decided.json"
        if file.is_file():
            found: dict[str, Any] = read_json(file)
            return found
        main = self.settings.roles.main
        flops = fits.flops_per_step(self.folder, self.settings, plan)
        equal: int | None = None
        if main in self.settings.arms and main != job.arm:
            arm = self._with_layers(Job(main, job.seed))
            against = fits.plan_of(self.folder, self.settings, Job(main, job.seed), arm)
            share = fits.flops_per_step(self.folder, self.settings, against) / flops
            if share < _NEARLY_ALL:
                equal = max(1, int(share * plan.stage.steps))
        facts = {"flops_per_step": flops, "equal_step": equal}
        why = "all steps cost less, or about as much" if equal is None else f"of {plan.stage.steps} steps"
        log_decision(f"study.{job.arm}.equal_step", equal, f"where it has cost what {main} costs; {why}")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, facts)
        return facts

    def _tidy(self, job: Job) -> None:
        """Remove the checkpoints of a job that is measured."""
        if self.settings.keep_checkpoints:
            return
        for folder in self.folder.of_job(job).glob("fit*/checkpoints"):
            shutil.rmtree(folder, ignore_errors=True)


def _step_facts(run: RunDirectory) -> Mapping[str, Any]:
    """Measured seconds of the fit."""
    file = run.path / "step_seconds.json"
    seconds = read_json(file) if file.is_file() else []
    if not seconds:
        return {"seconds_per_step": None}
    return {
        "seconds_per_step": round(statistics.median(seconds), 4),
        "seconds_of_steps": round(sum(seconds), 2),
        "timed_steps": len(seconds),
    }
