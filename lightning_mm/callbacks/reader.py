"""One forward pass over the probe set on every rank, gathered on rank 0; a failure on one rank is seen by all.

Data flow: probe set -> encoded batches, cached while they are small -> ``extract_hidden_states`` ->
``gather_hidden_states`` -> rank 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import lightning as L
from torch import Tensor

from lightning_mm.analysis.hidden_states import HiddenStates, extract_hidden_states, gather_hidden_states
from lightning_mm.core.distributed import run_on_all_ranks
from lightning_mm.core.errors import UserError
from lightning_mm.data.probe_sets.probe_set import ProbeBatch, ProbeSet
from lightning_mm.execution.activation_checkpointing import unchanged_slices
from lightning_mm.execution.cache.collators import is_pixels
from lightning_mm.training.eval_context import data_of, evaluation_mode, live

_HELD_BYTES = 512 * 2**20
"""Total bytes of encoded probe rows kept in memory; beyond it, rows are encoded again at every inspection."""


class Reader:
    """Extracts hidden states of the module in training, for all inspection callbacks.

    Args:
        trainer: The trainer; its data module loads the probe set.
        module: The LightningModule in training.
        probe_set: The rows to read.
    """

    def __init__(self, trainer: L.Trainer, module: L.LightningModule, probe_set: ProbeSet) -> None:
        self.trainer, self.module, self.probe_set = trainer, module, probe_set
        self.blank = probe_set.without_pictures()
        self._before: HiddenStates | None = None
        self._held: dict[str, list[ProbeBatch] | None] = {}
        self._states: dict[int, Tensor] = {}
        self._bytes = 0

    def read(self) -> tuple[HiddenStates | None, str]:
        """Hidden states of every row (rank 0 only, else None), and the failure reason, the same on every rank."""
        unchanged = unchanged_slices(live(self.module).plan)
        mine, failure = run_on_all_ranks(lambda: self._read(self.probe_set, "probes", self._before, unchanged))
        if mine is not None and unchanged and self._before is None:
            self._before = mine
        return self._gather(mine, failure, self.probe_set)

    def read_without_pictures(self) -> tuple[HiddenStates | None, str]:
        """``read`` of the entailment rows with grey pictures; ``(None, "")`` where there are no such rows."""
        if not len(self.blank):
            return None, ""
        mine, failure = run_on_all_ranks(lambda: self._read(self.blank, "without pictures", None, 0))
        return self._gather(mine, failure, self.blank)

    def _read(self, probe_set: ProbeSet, name: str, before: HiddenStates | None, unchanged: int) -> HiddenStates:
        module = live(self.module)
        with evaluation_mode(self.trainer, self.module):
            return extract_hidden_states(
                module.mm,
                self._encoded(probe_set, name),
                self.module.device,
                step=self.trainer.global_step,
                before=before,
                unchanged=unchanged,
                begin=self._from_trainable_block if name == "probes" and module.step.prefix is not None else None,
            )

    @contextmanager
    def _from_trainable_block(self, batch: ProbeBatch) -> Iterator[ProbeBatch]:
        """Cache the input of the lowest trainable block at the first inspection; later ones start from it."""
        prefix, device = live(self.module).step.prefix, self.module.device
        assert prefix is not None
        if id(batch) in self._states and self._held.get("probes"):  # held, so that the id is still this batch's
            inputs = {name: value for name, value in batch.inputs.items() if not is_pixels(name, value)}
            with prefix.starting_from(self._states[id(batch)].to(device)):
                yield replace(batch, inputs=inputs).to(device)
            return
        with prefix.record_inputs() as states:
            yield batch.to(device)
        self._states.pop(id(batch), None)
        if self._bytes + states[0].nbytes <= _HELD_BYTES:
            self._states[id(batch)] = states[0].cpu()
            self._bytes += states[0].nbytes

    def _gather(
        self, mine: HiddenStates | None, failure: UserError | str, probe_set: ProbeSet
    ) -> tuple[HiddenStates | None, str]:
        whole = None
        if mine is not None:
            # Apart from rows that fell out of the training data: they must not count towards its limit.
            data_of(self.trainer).rejected_samples.add(replace(each, kind="probe") for each in mine.rejected)
            whole, failure = run_on_all_ranks(lambda: gather_hidden_states(mine, probe_set))
        return whole, f"{failure.what} {failure.why}" if isinstance(failure, UserError) else failure

    def _encoded(self, probe_set: ProbeSet, name: str) -> Iterator[ProbeBatch]:
        """This rank's batches; cached while small, since encoding costs as much as the forward pass."""
        if held := self._held.get(name):
            yield from held
            return
        kept: list[ProbeBatch] | None = None if name in self._held else []
        size = 0
        for batch in data_of(self.trainer).probe_loader(probe_set):
            if kept is not None:
                size += batch.weights.nbytes + sum(tensor.nbytes for tensor in batch.inputs.values())
                kept.append(batch)
                if self._bytes + size > _HELD_BYTES:
                    kept = None
            yield batch
        self._held[name] = kept
        if kept is None:
            self._states.clear()
        else:
            self._bytes += size
