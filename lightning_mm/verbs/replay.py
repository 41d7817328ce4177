"""The verb replay: one step on the rows of a step that was not finite, from the state that its run has saved.

Data flow: ``RUN/nonfinite/step-N.json`` + config.yaml and a checkpoint of the run -> a fit of one step that writes
nothing, in the run's precision or another one -> what is not finite, or that all is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json
from lightning_mm.core.metric_names import TRAIN_LOSS
from lightning_mm.core.random_state import restore_rng
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.written_rows import IMAGE_ROOT
from lightning_mm.execution.cache.activation_cache import CacheSettings
from lightning_mm.training import checkpoint as state
from lightning_mm.training.callbacks.teardown import TeardownAfterException
from lightning_mm.training.checkpoint_file import KEY, read_checkpoint
from lightning_mm.training.module import MMModule
from lightning_mm.training.nonfinite import NonFiniteStepError
from lightning_mm.verbs.result import PrintedResult, open_decisions
from lightning_mm.verbs.rows import PathLike
from lightning_mm.verbs.trained_run import read_options

Precision = Literal["run", "32-true", "bf16-mixed"]
_AS_ONE_STEP: dict[str, Any] = {
    **dict.fromkeys(("val", "test", "predict", "probes", "max_tokens", "temperature", "rows_per_image"), None),
    **{"group_by_length": False, "share_images": False, "streaming": False, "num_workers": 0},
    "image_root": IMAGE_ROOT,
}
"""Options of the data under which its rows are one step, as they were."""
_WRITES_NOTHING: dict[str, Any] = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    **{"use_distributed_sampler": False, "limit_val_batches": 0, "num_sanity_val_steps": 0},
}
"""Options of the trainer."""


@dataclass(frozen=True)
class ReplayResult(PrintedResult):
    """What became of the step.

    Args:
        step: Number of the step in its run.
        checkpoint_step: Optimizer steps done in the checkpoint; one less than ``step`` where it is the state before it.
        precision: ``trainer.precision`` of the replay.
        loss: Mean loss; None where the step was not finite.
        cause: What is not finite, from where and in which rows; None where all is finite.
    """

    step: int
    checkpoint_step: int
    precision: str
    loss: float | None
    cause: str | None

    def tables(self) -> list[str]:
        """One line, and a second one where the checkpoint is not the state before the step."""
        found = self.cause or f"loss {self.loss:.4g}, loss and gradient are finite"
        said = f"Step {self.step} in {self.precision}: {found}."
        if self.checkpoint_step == self.step - 1:
            return [said]
        return [said, f"The weights are those after step {self.checkpoint_step}, not those before step {self.step}."]


def replay(file: PathLike, *, checkpoint: PathLike = "last", precision: Precision = "run") -> ReplayResult:
    """Run a step again that was not finite; the run's folder is left as it is.

    All rows at fault are one step on one device, from the random numbers of the checkpoint, and without the activation
    cache.

    Args:
        file: ``nonfinite/step-N.json`` in the folder of a run.
        checkpoint: Name in the run's checkpoints, or a path; 'last' (default) is the state before the step where the
            run stopped at it.
        precision: Precision of the computation: that of the 'run' (default), '32-true' or 'bf16-mixed'.

    Raises:
        UserError: There is no such file or checkpoint, or they do not belong together.
    """
    file, named = Path(file).absolute(), Path(checkpoint)
    run, (fault, num_rows) = RunDirectory(file.parent.parent), _read(file)
    saved = read_checkpoint(named if named.suffix == ".ckpt" else run.checkpoints / f"{checkpoint}.ckpt")
    with open_decisions():
        options = read_options(run.config)
        own = yaml.safe_load(run.config.read_text(encoding="utf-8")).get("trainer") or {}
        asked = str(own.get("precision") or "32-true") if precision == "run" else precision
        data = MMDataModule(
            **{**options.data.arguments, **_AS_ONE_STEP, "train": str(file), "batch_size": fault["batch_size"]}
        )
        trainer = L.Trainer(
            max_steps=1,
            accumulate_grad_batches=-(-num_rows // fault["batch_size"]),
            precision=asked,  # type: ignore[arg-type]  # one of Lightning's words, which the module checks
            accelerator=own.get("accelerator") or "auto",
            devices=1,
            callbacks=[_FromCheckpoint(saved)],
            **_WRITES_NOTHING,
        )
        cause = _one_step(_prepared(options.model, saved), data, trainer, saved)
    loss = None if cause is not None else float(trainer.callback_metrics[TRAIN_LOSS])
    return ReplayResult(fault["step"], int(saved["global_step"]), asked, loss, cause)


def _read(file: Path) -> tuple[dict[str, Any], int]:
    """What a file says of its step, and the number of its rows."""
    content = read_json(file)
    fault = content.get("fault") if isinstance(content, dict) else None
    if not isinstance(fault, dict) or not {"step", "batch_size"} <= fault.keys() or not content.get("rows"):
        raise UserError(f"{file} is no step to replay.", "It holds no fault with rows.", "Name nonfinite/step-N.json.")
    return fault, len(content["rows"])


def _prepared(module: MMModule, saved: dict[str, Any]) -> MMModule:
    """The module of the run, which stops at the first fault and gives the trainer no callbacks of a run."""
    module.resume_from(saved)
    module.skip_nonfinite, module.cache = 0, CacheSettings(mode="off")
    vars(module)["configure_callbacks"] = lambda: [TeardownAfterException()]
    return module


def _one_step(module: MMModule, data: MMDataModule, trainer: L.Trainer, saved: dict[str, Any]) -> str | None:
    """What is not finite in a step; None if all is finite."""
    data.resume_from(saved[KEY]["settings"])
    try:
        trainer.fit(module, datamodule=data)
    except NonFiniteStepError as error:
        return error.cause
    return None


class _FromCheckpoint(Callback):
    """Gives the module the weights of a checkpoint, and the process its random numbers, before the first step.

    Args:
        saved: The checkpoint.
    """

    def __init__(self, saved: dict[str, Any]) -> None:
        self.saved = saved

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, MMModule)
        state.validate_checkpoint(self.saved, pl_module.census, pl_module.base, pl_module.trainable)
        pl_module.load_state_dict(self.saved["state_dict"], strict=False)
        restore_rng(self.saved[KEY]["rng"][0])
