"""The fits of a study: each an ordinary ``lightning-mm fit`` in a process of its own, with a file of its options.

Data flow: settings + job -> fit.yaml -> ``python -m lightning_mm fit`` (goes on from last.ckpt where there is one) ->
the run's folder under work/; ``plan`` counts the FLOPs of a step with the same options.
"""

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json, write_atomically
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.study.folder import Job, StudyFolder
from lightning_mm.study.settings import START, Arm, Stage, StudySettings
from lightning_mm.training.checkpoint_file import read_checkpoint

EQUAL_COST = "equal_cost"
"""Name of the checkpoint at the step where an arm has cost as much as the main arm does in all its steps."""
_ORDER_OF_ARMS = 1000
"""Added to the seed of the rows' order in the second stage, so that it does not begin with the rows of the first."""
_MARKS = "lightning_mm.training.callbacks.step_marks"


@dataclass(frozen=True)
class FitPlan:
    """What a fit of a job is started with.

    Args:
        stage: Configs, options and steps of its stage.
        model: Folder that it begins from.
        arm: What it trains.
        job: Whose fit it is.
        equal_step: Step of a checkpoint in the middle; None: there is none.
    """

    stage: Stage
    model: str
    arm: Arm
    job: Job
    equal_step: int | None = None


def plan_of(folder: StudyFolder, settings: StudySettings, job: Job, arm: Arm) -> FitPlan:
    """The fit of an arm.

    Args:
        folder: The study's folder.
        settings: The study.
        job: The arm and its seed.
        arm: What it trains, with its layers written out.
    """
    return FitPlan(settings.stage2, folder.start(settings, job.seed), arm, job)


def first_stage(settings: StudySettings, seed: int) -> FitPlan:
    """The fit that all arms of a seed begin from: the connector."""
    assert settings.stage1 is not None
    return FitPlan(settings.stage1, settings.model, Arm(tuning="ConnectorOnly"), Job(START, seed))


def arguments(folder: StudyFolder, settings: StudySettings, plan: FitPlan) -> list[str]:
    """Arguments of ``fit`` for a job, and its file of options.

    Args:
        folder: The study's folder.
        settings: The study.
        plan: The fit.
    """
    place = folder.of_job(plan.job)
    place.mkdir(parents=True, exist_ok=True)
    file = place / "fit.yaml"
    write_atomically(file, yaml.safe_dump(_options(settings, plan, place), sort_keys=False))
    configs = [*settings.configs, *plan.stage.configs, str(file)]
    given = {**settings.options, **plan.stage.options}
    options = [part for name, value in given.items() for part in (f"--{name}", _spelled(value))]
    return [part for config in configs for part in ("-c", config)] + options


def run_fit(folder: StudyFolder, settings: StudySettings, plan: FitPlan) -> RunDirectory:
    """Fit, or go on where an earlier process was stopped; nothing is done if all steps are.

    Args:
        folder: The study's folder.
        settings: The study.
        plan: The fit.

    Raises:
        UserError: The fit has failed; its last lines are told.
    """
    place = folder.of_job(plan.job)
    if (done := finished_run(place, plan.stage.steps)) is not None:
        return done
    given = [*arguments(folder, settings, plan), "--ckpt_path", "auto"]
    run_verb("fit", given, place / "fit.log")
    done = finished_run(place, plan.stage.steps)
    if done is None:
        raise UserError(
            f"The fit of {plan.job} ended before step {plan.stage.steps}.",
            f"Its log is {place / 'fit.log'}.",
            "Mend what it says there.",
        )
    return done


def finished_run(place: Path, steps: int) -> RunDirectory | None:
    """The run of a job that has done all its steps; None: there is none yet."""
    for run in sorted(place.glob("fit*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True):
        if int(read_checkpoint(run)["global_step"]) >= steps:
            return RunDirectory(run.parent.parent)
    return None


def equal_cost_checkpoint(place: Path) -> Path | None:
    """The checkpoint at equal cost: a fit that was resumed may have it in the folder of its first part."""
    found = sorted(place.glob(f"fit*/checkpoints/{EQUAL_COST}.ckpt"), key=lambda file: file.stat().st_mtime)
    return found[-1] if found else None


def flops_per_step(folder: StudyFolder, settings: StudySettings, plan: FitPlan) -> float:
    """Least FLOPs of a step, as ``plan`` counts them on real batches; counted once per policy.

    Args:
        folder: The study's folder.
        settings: The study.
        plan: The fit.
    """
    place = folder.work / "costs"
    place.mkdir(parents=True, exist_ok=True)
    policy = json.dumps(_policy(settings, plan)[0], sort_keys=True)
    file = place / f"{plan.job.arm}-{hashlib.sha256(policy.encode()).hexdigest()[:10]}.json"
    if not file.is_file():
        written = place / f".{file.name}.{os.getpid()}"
        given = [*arguments(folder, settings, plan), "--device", "cpu", "--compare", "false", "--json", str(written)]
        run_verb("plan", given, file.with_suffix(".log"))
        written.replace(file)
    return float(read_json(file)["policies"][0]["flops"]["run"])


def base_config(folder: StudyFolder, settings: StudySettings) -> dict[str, Any]:
    """All options of a fit of the second stage, as ``--print_config`` writes them: how data is read, and precision.

    Args:
        folder: The study's folder.
        settings: The study.
    """
    file = folder.work / "config.yaml"
    if not file.is_file():
        plan = FitPlan(settings.stage2, settings.model, Arm(tuning="ConnectorOnly"), Job("config", settings.seeds[0]))
        printed = run_verb("fit", [*arguments(folder, settings, plan), "--print_config"], folder.work / "config.log")
        write_atomically(file, printed)
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def run_verb(verb: str, given: Sequence[str], log: Path) -> str:
    """Run a verb in a process of its own; returns what it printed to stdout. Its stderr goes to a file.

    Raises:
        UserError: It has failed.
    """
    command = [sys.executable, "-m", "lightning_mm", verb, *given]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=file, text=True, preexec_fn=_end_with_parent, check=False
        )
        file.write(done.stdout[-20000:])
    if done.returncode in (130, 143, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if done.returncode:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
        told = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
        raise UserError(f"{verb} has failed.", told.removeprefix("error: "), f"See {log}.")
    return done.stdout


def _end_with_parent() -> None:
    """In the new process: hear SIGTERM when the study's process ends, however it does; a fit then saves and ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _options(settings: StudySettings, plan: FitPlan, place: Path) -> dict[str, Any]:
    """What the study sets of a fit's options."""
    callbacks: list[dict[str, Any]] = [{"class_path": f"{_MARKS}.StepSeconds"}]
    if plan.equal_step is not None:
        init = {"step": plan.equal_step, "name": EQUAL_COST}
        callbacks.append({"class_path": f"{_MARKS}.CheckpointAt", "init_args": init})
    order = plan.job.seed + (0 if plan.job.arm == START else _ORDER_OF_ARMS)
    policy, lr = _policy(settings, plan)
    return {
        "seed_everything": plan.job.seed,
        "model": {"backbone": {"path": plan.model}, "tuning": policy, "optimizer": {"lr": lr}},
        "data": {"val": None, "test": None, "predict": None, "seed": order},
        "trainer": {"max_steps": plan.stage.steps, "max_epochs": -1, "callbacks+": callbacks},
        "evaluation": {"before": False, "after": False, "no_image": False},
        "run": {"root": str(place), "name": "fit", "wandb": "off", "save_every": settings.save_every},
    }


def _policy(settings: StudySettings, plan: FitPlan) -> tuple[dict[str, Any], float]:
    """The policy as a config file names it, and the learning rate of what has no rate of its own."""
    arm = plan.arm
    if arm.tuning == "ConnectorOnly":
        lr = settings.connector_lr if arm.lr is None else arm.lr
        return {"class_path": arm.tuning, "init_args": _seeded(arm.options, plan.job.seed)}, lr
    options = _seeded(arm.options, plan.job.seed)
    if arm.train_connector:
        options.setdefault("connector", "full")
        options["lr"] = {"connector": settings.connector_lr, **options.get("lr", {})}
    return {"class_path": arm.tuning, "init_args": options}, settings.lr if arm.lr is None else arm.lr


def _seeded(options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The options with the seed in place of {seed}."""
    filled: dict[str, Any] = json.loads(json.dumps(options).replace('"{seed}"', str(seed)).replace("{seed}", str(seed)))
    return filled


def _spelled(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
