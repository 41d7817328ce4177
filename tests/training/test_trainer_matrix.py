"""Options, loggers, callbacks and plugins of the trainer: each does what it says, or is refused at the start.

Data flow: options -> ``fit`` of two steps through the command line, in this process -> its files and its output.
"""

import json
import shlex
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.helpers.data import Data, Family
from tests.helpers.fits import Fits, Fitted, read_table, short_fits

Check = Callable[[Fitted], bool]


@pytest.fixture
def fits(
    family: Family, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Fits]:
    yield short_fits(family("llava"), data, tmp_path, capfd, monkeypatch)
    torch.use_deterministic_algorithms(False)  # Lightning leaves both as they were asked for
    torch.backends.cudnn.benchmark = False


def callback(name: str, **options: object) -> str:
    """The option that adds a callback."""
    given = ", ".join(f"{key}: {value}" for key, value in options.items())
    return shlex.quote(f"--trainer.callbacks+={{class_path: {name}, init_args: {{{given}}}}}")


def logged(key: str) -> Check:
    """Whether some column of metrics.csv that begins so has values."""
    return lambda fit: any(value for row in fit.rows for name, value in row.items() if name.startswith(key))


def says(*words: str) -> Check:
    return lambda fit: all(word in fit.output for word in words)


def has(*names: str) -> Check:
    """Whether the current folder has such files (patterns)."""
    return lambda fit: all(list(fit.folder.glob(name)) for name in names)


def lacks(*names: str) -> Check:
    return lambda fit: not any(list(fit.folder.glob(name)) for name in names)


def steps(number: int) -> Check:
    return lambda fit: fit.step == number


def ended_early(fit: Fitted) -> bool:
    return 0 < fit.step < 100_000 and "its time is over" in fit.decisions


def validations(number: int) -> Check:
    return lambda fit: sum(bool(row.get("val/loss")) for row in fit.rows) == number


def precision(name: str) -> Check:
    return lambda fit: fit.read("hyperparameters.json")["trainer.precision"] == name


def clipped(fit: Fitted) -> bool:
    """Whether AdamW's first moment shows gradients of a norm of 1e-3 at most, as all are here."""
    moments = [state["exp_avg"].flatten() for state in fit.checkpoint()["optimizer_states"][0]["state"].values()]
    return 0 < torch.cat(moments).norm() < 1e-3 and float(fit.rows[-1]["train/grad_norm"]) > 1e-2


def only_the_connector(fit: Fitted) -> bool:
    """Whether the checkpoint holds only what trains."""
    return fit.step == 2 and all("projector" in name for name in fit.checkpoint()["state_dict"])


VAL = "--trainer.limit_val_batches=1 --data.generation_samples=0"
EPOCHS = "--trainer.max_steps=-1 --trainer.max_epochs=2 --trainer.limit_train_batches=1"
WORKS: dict[str, tuple[str, Check]] = {
    "enable_progress_bar": ("--trainer.enable_progress_bar=false", lambda fit: "step 1/2" not in fit.output),
    "our bar": ("", says("step 1/2", "step 2/2")),
    "RichProgressBar": (callback("RichProgressBar"), lambda f: "Epoch 0" in f.output and "step 1/2" not in f.output),
    "TQDMProgressBar": (callback("TQDMProgressBar"), lambda f: "Epoch 0" in f.output and "step 1/2" not in f.output),
    "a callback that is no list": ("--trainer.callbacks LearningRateMonitor", logged("lr-AdamW")),
    "a callback as a mapping": ("-c '{trainer: {callbacks: {class_path: LearningRateMonitor}}}'", logged("lr-AdamW")),
    "callbacks null": ("--trainer.callbacks null", steps(2)),
    "simple profiler": ("--trainer.profiler simple", says("Profiler Report", "run_training_epoch")),
    "advanced profiler": ("--trainer.profiler advanced", says("Profile stats for: run_training_epoch")),
    "pytorch profiler": ("--trainer.profiler pytorch", has("runs/x/fit-*training_step*.json")),
    "profiler with a file": (
        "--trainer.profiler SimpleProfiler --trainer.profiler.dirpath . --trainer.profiler.filename mine",
        has("fit-mine.txt"),
    ),
    "enable_checkpointing": ("--trainer.enable_checkpointing=false", lacks("**/*.ckpt")),
    "default_root_dir": ("--trainer.default_root_dir elsewhere", has("elsewhere/x/checkpoints/last.ckpt")),
    "WeightAveraging": (callback("WeightAveraging"), only_the_connector),
    "GradientAccumulationScheduler": (
        f"{callback('GradientAccumulationScheduler', scheduling='{0: 3, 1: 1}')} --trainer.max_steps=-1 "
        "--trainer.max_epochs=2",
        lambda fit: fit.step == 2 + 6 == fit.checkpoint()["lightning_mm"]["settings"]["trainer.steps"],
    ),
    "deterministic": (
        "--trainer.deterministic=true",
        lambda fit: fit.step == 2 and torch.are_deterministic_algorithms_enabled(),
    ),
    "benchmark": ("--trainer.benchmark=true", lambda fit: fit.step == 2 and torch.backends.cudnn.benchmark),
    "overfit_batches": ("--trainer.overfit_batches=1", lambda fit: fit.step == 2 and fit.rows[-1]["epoch"] == "1"),
    "fast_dev_run": ("--trainer.fast_dev_run=1", lacks("**/*.ckpt")),
    "num_sanity_val_steps": (f"--trainer.num_sanity_val_steps=1 {VAL}", validations(0)),
    "limit_train_batches": ("--trainer.limit_train_batches=1", lambda fit: fit.rows[-1]["epoch"] == "1"),
    "no batch": ("--trainer.limit_train_batches=0", says("no step was trained")),
    "max_steps 0": ("--trainer.max_steps=0", says("no step was trained")),
    "check_val_every_n_epoch": (f"{VAL} {EPOCHS} --trainer.check_val_every_n_epoch=2", validations(1)),
    "val_check_interval": (f"{VAL} --trainer.val_check_interval=1", validations(2)),
    "gradient_clip_algorithm norm": ("--trainer.gradient_clip_val=1e-3", clipped),
    "gradient_clip_algorithm value": (
        "--trainer.gradient_clip_val=1e-5 --trainer.gradient_clip_algorithm=value",
        clipped,
    ),
    "precision 32": ("--trainer.precision=32", precision("32-true")),
    "detect_anomaly": ("--trainer.detect_anomaly=true", steps(2)),
    "accumulate_grad_batches": (
        "--trainer.accumulate_grad_batches=3 --trainer.max_steps=-1 --trainer.max_epochs=1",
        steps(2),
    ),
    "max_time": ("--trainer.max_time=00:00:00:01 --trainer.max_steps=100000", ended_early),
    "Timer": (f"{callback('Timer', duration='00:00:00:01')} --trainer.max_steps=100000", ended_early),
    "min_steps": (
        f"{callback('EarlyStopping', monitor='train/loss', min_delta=100, patience=0)} --trainer.max_steps=8 "
        "--trainer.limit_train_batches=1 --trainer.min_steps=3",
        steps(3),
    ),
    "EarlyStopping": (
        f"{callback('EarlyStopping', monitor='train/loss', min_delta=100, patience=0)} --trainer.max_steps=8 "
        "--trainer.limit_train_batches=1",
        lambda fit: fit.step == 2 and "EarlyStopping: " in fit.decisions,
    ),
    "log_every_n_steps": (
        "--trainer.log_every_n_steps=2",
        lambda fit: [row["step"] for row in fit.rows] == ["1"],
    ),
    "one logger": (
        "--trainer.logger CSVLogger --trainer.logger.save_dir logs",
        lambda fit: "train/loss" in read_table(fit.folder / "logs/lightning_logs/version_0/metrics.csv")[0],
    ),
    "a list of loggers": (
        "--trainer.logger '[{class_path: CSVLogger, init_args: {save_dir: logs, name: a}}, "
        "{class_path: CSVLogger, init_args: {save_dir: logs, name: b}}]'",
        has("logs/a/version_0/metrics.csv", "logs/b/version_0/metrics.csv", "runs/x/metrics.csv"),
    ),
    "logger false": (
        "--trainer.logger=false --run.wandb=offline",
        lacks("**/wandb"),
    ),
    "logger null": ("--trainer.logger=null", logged("train/loss")),
    "wandb offline": ("--run.wandb=offline", has("runs/x/wandb/offline-run-*/*.wandb")),
    "DeviceStatsMonitor": (
        callback("DeviceStatsMonitor", cpu_stats="true"),
        logged("DeviceStatsMonitor."),
    ),
    "ModelSummary": (callback("ModelSummary", max_depth=2), says("Trainable params", "model.model")),
    "RichModelSummary": (callback("RichModelSummary"), says("Trainable params")),
    "enable_model_summary": ("--trainer.enable_model_summary=true", says("Trainable params")),
    "two ModelCheckpoints": (
        f"{callback('ModelCheckpoint', filename='a', monitor='train/loss', every_n_train_steps=1)} "
        f"{callback('ModelCheckpoint', filename='b', dirpath='other', every_n_train_steps=1)}",
        has("runs/x/checkpoints/a.ckpt", "other/b.ckpt", "runs/x/checkpoints/last.ckpt"),
    ),
    "ModelCheckpoint of the validation loss": (
        f"{callback('ModelCheckpoint', filename='own', monitor='val/loss')} {VAL} --trainer.val_check_interval=1",
        has("runs/x/checkpoints/own.ckpt", "runs/x/checkpoints/best.ckpt"),
    ),
    "OnExceptionCheckpoint": (callback("OnExceptionCheckpoint", dirpath="kept"), steps(2)),
    "LastCheckpoint of the user": (callback("LastCheckpoint", every=1), steps(2)),
    "use_distributed_sampler": ("--trainer.use_distributed_sampler=true", steps(2)),
    "reload_dataloaders_every_n_epochs": (f"--trainer.reload_dataloaders_every_n_epochs=1 {EPOCHS}", steps(2)),
    "sync_batchnorm": ("--trainer.sync_batchnorm=true", steps(2)),
    "inference_mode": (f"--trainer.inference_mode=false {VAL} --trainer.val_check_interval=1", validations(2)),
    "strategy auto": ("--trainer.strategy auto --trainer.devices auto", steps(2)),
    "accelerator auto": ("--trainer.accelerator auto", steps(2)),
    "AsyncCheckpointIO": ("--trainer.plugins AsyncCheckpointIO", steps(2)),
    "TorchCheckpointIO": ("--trainer.plugins TorchCheckpointIO", steps(2)),
}
PRUNING = callback("ModelPruning", pruning_fn="l1_unstructured")
REFUSED: dict[str, tuple[str, str]] = {
    "barebones": ("--trainer.barebones=true", "trainer.barebones: true leaves no run."),
    "LearningRateFinder": (callback("LearningRateFinder"), "LearningRateFinder cannot be used."),
    "BatchSizeFinder": (callback("BatchSizeFinder"), "BatchSizeFinder cannot be used."),
    "BackboneFinetuning": (callback("BackboneFinetuning"), "BackboneFinetuning cannot be used."),
    "ModelPruning": (PRUNING, "ModelPruning cannot be used."),
    "StochasticWeightAveraging": (callback("StochasticWeightAveraging", swa_lrs=0.1), "Use WeightAveraging"),
    "two schedules of accumulation": (
        f"{callback('GradientAccumulationScheduler', scheduling='{0: 2}')} --trainer.accumulate_grad_batches=2",
        "both say how many batches a step has",
    ),
    "two callbacks of one kind": (
        f"{callback('ProbingCallback')} {callback('ProbingCallback')}",
        "trainer.callbacks names ProbingCallback 2 times.",
    ),
    "EarlyStopping without a validation": (callback("EarlyStopping", monitor="val/loss"), "the run does not validate"),
    "EarlyStopping on another name": (callback("EarlyStopping", monitor="val_loss"), "Did you mean val/loss?"),
    "EarlyStopping on a mistyped name": (callback("EarlyStopping", monitor="val/losss"), "Did you mean val/loss?"),
    "ModelCheckpoint on another name": (callback("ModelCheckpoint", monitor="train_loss"), "Did you mean train/loss?"),
    "a class that is no callback": ("--trainer.callbacks NoSuchThing", "'NoSuchThing' is no callback."),
    "MLFlowLogger": ("--trainer.logger MLFlowLogger", "pip install mlflow"),
    "CometLogger": ("--trainer.logger CometLogger", "pip install comet-ml"),
    "TensorBoardLogger": (
        "--trainer.logger TensorBoardLogger --trainer.logger.save_dir logs",
        "pip install tensorboard",
    ),
    "a class that is no logger": ("--trainer.logger CSVLoger", "Did you mean CSVLogger?"),
    "precision of the whole model": ("--trainer.precision=64-true", "trainer.precision: 64-true is not supported."),
    "precision bf16-true": ("--trainer.precision=bf16-true", "32-true with model.backbone.dtype bfloat16"),
    "precision 16-mixed": ("--trainer.precision=16-mixed", "trainer.precision: 16-mixed is not supported."),
    "precision 8": ("--trainer.precision=8", "trainer.precision: '8' is no choice."),
    "a precision plugin": ("--trainer.plugins DoublePrecision", "64-true is not supported."),
    "val_check_interval": (f"{VAL} --trainer.val_check_interval=100", "less than or equal to the number"),
    "gradient_clip_val": ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val: -1 is negative."),
    "gradient_clip_algorithm": ("--trainer.gradient_clip_algorithm=most", "Allowed algorithms"),
    "accumulate_grad_batches": ("--trainer.accumulate_grad_batches=0", "is no number of batches"),
    "max_time": ("--trainer.max_time=soon", "is not a valid duration"),
    "max_steps": ("--trainer.max_steps=-2", "`max_steps` must be"),
    "no end": ("--trainer.max_steps=-1 --trainer.max_epochs=-1", "The length of the run is not known."),
    "limit_train_batches": ("--trainer.limit_train_batches=1.5", "limit_train_batches"),
    "devices 0": ("--trainer.devices=0", "value is not a valid input"),
    "devices in words": ("--trainer.devices=two", "The trainer cannot be set up."),
    "num_nodes": ("--trainer.num_nodes=0", "`num_nodes` must be a positive integer"),
    "accelerator": ("--trainer.accelerator=gpuu", "Did you mean gpu?"),
    "accelerator mps": ("--trainer.accelerator=mps", "can not run on your system"),
    "strategy": ("--trainer.strategy=dddp", "Did you mean ddp?"),
    "strategy fsdp": ("--trainer.strategy=fsdp", "fsdp"),
    "strategy deepspeed": ("--trainer.strategy=deepspeed", "pip install deepspeed"),
    "a plugin that is none": ("--trainer.plugins=NoSuchThing", "trainer.plugins cannot be read."),
}
PACKAGES = {"MLFlowLogger": "mlflow", "CometLogger": "comet_ml", "TensorBoardLogger": "tensorboard"}


@pytest.mark.parametrize("cell", WORKS)
def test_works(cell: str, fits: Fits) -> None:
    options, check = WORKS[cell]
    fit = fits(*shlex.split(options))
    assert fit.status == 0, fit.output
    assert check(fit), fit.output


@pytest.mark.parametrize("cell", REFUSED)
def test_is_refused_in_one_line(cell: str, fits: Fits) -> None:
    options, said = REFUSED[cell]
    if find_spec(PACKAGES.get(cell, "no_such_package")) is not None:
        pytest.skip(f"{PACKAGES[cell]} is installed")
    fit = fits(*shlex.split(options))
    assert fit.status == 2
    assert said in fit.error
    assert "Traceback" not in fit.output
    assert not fit.run.exists()


def test_the_score_of_one_question_type_may_be_watched(fits: Fits, data: Data) -> None:
    """Its name is close to that of all types, and is no spelling of it."""
    rows = json.loads(data["val"].read_text())
    for index, row in enumerate(rows):
        row["conversations"][1]["type"] = "any" if index else "colour"
    data["val"].write_text(json.dumps(rows))
    watched = callback("ModelCheckpoint", monitor="val/exact_match/any", mode="max", filename="any")
    fit = fits(*shlex.split(watched), "--trainer.limit_val_batches=4", "--trainer.val_check_interval=1")
    assert fit.status == 0, fit.output
    assert (fit.run / "checkpoints/any.ckpt").is_file()
