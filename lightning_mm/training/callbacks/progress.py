"""How far a run is: one calm bar for the whole run, or one plain line per log interval where there is no terminal.

Data flow: the Trainer's step and the values logged under the keys of ``names`` -> one rich bar, or the logger.
Values are read once per log interval, so that showing them never makes the device wait in between.
"""

import logging
import math
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.callbacks import Timer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from lightning_mm.core import metric_names
from lightning_mm.core.console import message_console
from lightning_mm.training.run_length import total_steps

log = logging.getLogger("lightning_mm")


class ProgressBar(LightningProgressBar):
    """Loss, answer tokens per second, time left, and optimizer steps of all steps.

    Validation shows as a word beside the bar, for it belongs to the run and not beside it.

    Args:
        console: Where the bar goes; a terminal gets a bar, anything else a line per ``Trainer.log_every_n_steps``.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._given_console = console
        self._enabled = True
        self._bar: Progress | None = None
        self._lent: dict[logging.StreamHandler[Any], Any] = {}
        self._task = TaskID(0)
        self._clock = _Clock()
        self._first_step, self._interval = 0, 1
        self._said = -1

    @property
    def _console(self) -> Console:
        return self._given_console or message_console()

    @property
    def is_enabled(self) -> bool:
        return self._enabled

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = self._said = trainer.global_step
        self._clock = _Clock()
        self._interval = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set by its logger connector
        self._open("training", total_steps(trainer), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if step != self._said and step % self._interval == 0:
            self._show(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._said:
            self._show(trainer)
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.pause()
        if trainer.state.fn == "fit":
            self._word("checking" if trainer.sanity_checking else "validating")
        else:
            self._open("validating", _count(trainer.num_val_batches), 0)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != "fit":
            self._advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.resume()
        if trainer.state.fn == "fit":
            self._word("training")
        else:
            self._close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open("testing", _count(trainer.num_test_batches), 0)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._advance()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_bar": None, "_lent": {}, "_given_console": None}  # a live bar holds thread locks

    def _show(self, trainer: Trainer) -> None:
        """Read the logged values (the one place that may wait for the device), and show them."""
        if not self._enabled:
            return
        step, total = trainer.global_step, total_steps(trainer)
        self._said = step
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key in _SHOWN}
        left = self._clock.left(step - self._first_step, None if total is None else total - step)
        for timer in trainer.callbacks:  # type: ignore[attr-defined]  # set by its callback connector
            if isinstance(timer, Timer) and (allowed := timer.time_remaining()) is not None:
                left = max(0.0, allowed if left is None else min(left, allowed))
        words = describe(values, left, narrow=self._bar is not None and self._console.width < _WIDE)
        if self._bar is not None:
            self._bar.update(self._task, words=words)
        else:
            width = len(str(total)) if total is not None else 7
            log.info("%s", f"step {step:>{width}}/{'?' if total is None else total}  {words}")

    def _open(self, word: str, total: int | None, completed: int) -> None:
        self._close()
        if not self._enabled or not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=28 if self._console.width >= _WIDE else None),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(total or 0)) + 1)),
            TextColumn("{task.fields[words]}", table_column=Column(no_wrap=True)),
            console=self._console,
            expand=self._console.width < _WIDE,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(word, total=total, completed=completed, words="")
        self._bar.start()
        # Its own handler holds the stream from before, and would write into the bar.
        for handler in logging.getLogger("lightning.pytorch").handlers:
            if type(handler) is logging.StreamHandler and not handler.stream.closed:
                self._lent[handler] = handler.setStream(sys.stderr)

    def _word(self, word: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=word)

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def _close(self) -> None:
        if self._bar is not None:
            for handler, stream in self._lent.items():
                handler.setStream(stream or handler.stream)
            self._lent = {}
            self._bar.stop()
            self._bar = None


class _Clock:
    """Seconds spent on training itself: validation does not make the training look slow."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._since: float | None = time.monotonic()

    def pause(self) -> None:
        self._spent, self._since = self.seconds, None

    def resume(self) -> None:
        self._since = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._spent + (0.0 if self._since is None else time.monotonic() - self._since)

    def left(self, done: int, remaining: int | None) -> float | None:
        """Seconds of training left at the pace so far; None where it cannot be known."""
        return None if remaining is None or done <= 0 else self.seconds / done * max(0, remaining)


_SHOWN = (metric_names.TRAIN_LOSS, metric_names.SUPERVISED_TOKENS_PER_SECOND, metric_names.VAL_EXACT_MATCH)


_WIDE = 115
"""Columns from which bar and values have all the room that they would take."""


def describe(values: dict[str, float], seconds_left: float | None, narrow: bool = False) -> str:
    """The values as one line of fixed width, so that lines stand under each other.

    Args:
        values: Logged values, by their keys.
        seconds_left: Seconds of training left; None: not known.
        narrow: Use shorter words; default False.

    Example:
        >>> describe({"train/loss": 1.25, "train/supervised_tokens_per_second": 640.0}, 65)
        'loss 1.2500      640 tok/s   0:01:05 left'
    """
    loss, speed, match = (values.get(key) for key in _SHOWN)
    parts = [
        f"loss {'     –' if loss is None else f'{loss:6.4f}'}",
        f"{'–' if speed is None else f'{speed:,.0f}':>7} tok/s",
        f"{_duration(seconds_left):>8} left",
    ]
    if match is not None:
        parts.append(f"match {100 * match:3.0f} %" if narrow else f"exact match {100 * match:5.1f} %")
    return "  ".join(parts)


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def _count(batches: int | float | list[int | float]) -> int | None:
    total = sum(batches) if isinstance(batches, list) else batches
    return int(total) if math.isfinite(total) and total >= 0 else None
