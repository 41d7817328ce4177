"""Make the folder of a run, and write down what the run is and what became of it: census, decisions, report.

Data flow: module, data module and the decisions of the run -> the run directory -> ``report.html.write_report``. Rank 0
writes.
"""

import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.table import Table

from lightning_mm.core import metric_names
from lightning_mm.core.console import TABLE_WIDTH, message_console
from lightning_mm.core.decisions import DecisionLog, decision_log, log, log_decision, run_is_open
from lightning_mm.core.io import append_jsonl, write_json
from lightning_mm.core.notebook import show_link
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.batch import PromptBatch
from lightning_mm.report.html import write_report
from lightning_mm.training.eval_context import data_of, live
from lightning_mm.training.first_samples import first_samples
from lightning_mm.training.hyperparameters import hyperparameters
from lightning_mm.training.run_config import write_config
from lightning_mm.training.run_folder import make_run_folder, use_run_folder
from lightning_mm.training.run_length import early_end, total_steps
from lightning_mm.tuning.census import Census
from lightning_mm.tuning.part_sizes import describe_parts

GENERATIONS = 8
"""So many answers of each validation are kept in ``generations.jsonl``."""


class RunRecorder(Callback):
    """Makes a folder for each fit, keeps it up to date, and shows the census before the first step.

    A fit never writes into the folder of another one. ``validate``, ``test`` and ``predict`` write into that of the
    fit before them with the same trainer, and make one of their own where there was none.

    Args:
        run: A folder that is made already; None (default): one is made when a run starts.
        root: Folder of all runs; None (default): ``runs`` in the trainer's ``default_root_dir``.
        name: Name of the run; None (default): the policy's. A name that is taken gets -2, -3, ...
    """

    def __init__(
        self, run: RunDirectory | None = None, *, root: str | Path | None = None, name: str | None = None
    ) -> None:
        self._given, self._root, self._name = run, root, name
        self._current = run
        self.decisions = DecisionLog()
        self._shown = self._marked = False
        self._open = ExitStack()

    @property
    def run(self) -> RunDirectory:
        """The folder of the run, from the callback's ``setup`` on."""
        assert self._current is not None, "the run's folder is made when the run starts"
        return self._current

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the run's folder, and record its decisions apart from others', unless the command line did so."""
        earlier = self._current
        if self._given is not None:
            self._current, self._given = self._given, None
        elif earlier is None or stage == "fit":
            policy = type(live(pl_module).tuning).__name__
            root = self._root or (earlier.path.parent if earlier else Path(trainer.default_root_dir) / "runs")
            default = policy if stage == "fit" else f"{policy}-{stage}"
            self._current = make_run_folder(trainer, root, self._name, default)
            self.decisions, self._shown, self._marked = DecisionLog(), False, False
        use_run_folder(trainer, self.run, earlier)
        if not run_is_open():
            self._open.enter_context(self.decisions.opened())
            self.decisions.take_pending()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._open.close()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._mark_begun(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._mark_begun(trainer)

    def on_test_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._mark_begun(trainer)

    def on_predict_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._mark_begun(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._note(trainer, batch, "train")
        lost = sum(entry.kind != "probe" for entry in data_of(trainer).rejected_samples)
        pl_module.log(metric_names.REJECTED, float(lost))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: int
    ) -> None:
        self._note(trainer, batch, "val")
        if isinstance(batch, PromptBatch) and batch_idx == 0 and trainer.is_global_zero and not trainer.sanity_checking:
            append_jsonl(
                self.run.path / "generations.jsonl", _generations(trainer.global_step, batch, outputs["answers"])
            )

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        self._note(trainer, batch, "test")

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        self._note(trainer, batch, "predict")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write down what was rejected so far: a run that goes on from here does not meet those rows again."""
        if trainer.is_global_zero and self._current is not None:
            data_of(trainer).rejected_samples.write(self.run.ledger)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer)
            data_of(trainer).rejected_samples.check()  # each rank has checked what it dropped itself

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (why := early_end(trainer)) is not None:
            total = total_steps(trainer)
            of = "" if total is None else f" of {total}"
            log_decision("trainer", f"the run ends at step {trainer.global_step}{of}", why)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._marked:
            why = "trainer.max_steps, max_epochs or limit_train_batches leave none, or the checkpoint has done them all"
            log_decision("trainer", "no step was trained", why)
        self._write(trainer)
        if trainer.is_global_zero and not show_link(self.run.report):
            log.info("report: %s", self.run.report)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        try:
            if self._current is None or not trainer.is_global_zero:
                return
            if self.run.has_begun and self._shown:
                self._write_files(trainer)
            elif not self.run.has_begun:
                shutil.rmtree(self.run.path, ignore_errors=True)
        finally:
            self._open.close()

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._shown or not trainer.is_global_zero:
            return
        self._shown = True
        data_of(trainer).rejected_samples.read(self.run.ledger)
        write_config(self.run, trainer)
        census = live(pl_module).census
        write_json(self.run.census, census.to_dict())
        if (selection := live(pl_module).selection) is not None:
            write_json(self.run.selection, selection.to_dict())
        settings = hyperparameters(trainer, pl_module)
        write_json(self.run.hyperparameters, settings)
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)
        message_console().print(census_table(census))
        if trainer.state.fn == TrainerFn.FITTING and not trainer.ckpt_path:
            for text in first_samples(data_of(trainer)):
                message_console().print(text, highlight=False)
        self._write_files(trainer)

    def _mark_begun(self, trainer: L.Trainer) -> None:
        if not self._marked and trainer.is_global_zero:
            self.run.begin()
        self._marked = True

    def _note(self, trainer: L.Trainer, batch: Any, split: str) -> None:
        if batch.rejected:
            ledger = data_of(trainer).rejected_samples
            ledger.add(batch.rejected, split)
            ledger.check()

    def _write(self, trainer: L.Trainer) -> None:
        data_of(trainer).rejected_samples.gather()
        if trainer.is_global_zero:
            self._write_files(trainer)

    def _write_files(self, trainer: L.Trainer) -> None:
        data = data_of(trainer)
        data.rejected_samples.write(self.run.ledger)
        counts = data.rows.source_counts()
        if len(counts) > len({each["split"] for each in counts}):  # a split of several sources
            write_json(self.run.sources, counts)
        write_json(self.run.decisions, [asdict(decision) for decision in decision_log()])
        for logger in trainer.loggers:
            logger.save()
        write_report(self.run.path)


def _generations(step: int, batch: PromptBatch, answers: list[str]) -> list[dict[str, Any]]:
    """Some answers of a validation, with their pictures and what would have been right."""
    rows = list(zip(batch.samples, batch.turns, answers, strict=True))[:GENERATIONS]
    return [
        {
            "step": step,
            "images": [str(path) for path in sample.images],
            "question": sample.turns[turn - 1].text,
            "truth": sample.turns[turn].text,
            "answer": answer,
        }
        for sample, turn, answer in rows
    ]


def census_table(census: Census) -> Table:
    """The census as the console shows it."""
    share = census.trainable / census.total
    title = f"{census.policy}: {census.trainable:,} of {census.total:,} weights train ({share:.1%})"
    table = Table(title=title, min_width=min(len(title), TABLE_WIDTH))
    for column in ("region", "trains", "dtype", "mode"):
        table.add_column(column)
    for column in ("weights", "trainable", "lr"):
        table.add_column(column, justify="right")
    for row in census.rows:
        style = "bold" if row.trainable else "dim"
        mode, lr = "train" if row.training else "eval", "" if row.lr is None else f"{row.lr:g}"
        table.add_row(
            row.region, row.mode, row.dtype, mode, f"{row.parameters:,}", f"{row.trainable:,}", lr, style=style
        )
    table.caption = f"layers {census.expression} of {census.num_layers}, digest {census.digest[:12]}"
    table.caption += f"\nweights of all layers: {describe_parts(census.parts)}"
    return table
