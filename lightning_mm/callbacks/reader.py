"""One forward pass over the probe set on every rank, gathered on rank 0; a failure on one rank is seen by all.

Data flow: probe set -> encoded batches, cached while they are small -> ``extract_hidden_states`` ->
``gather_hidden_states`` -> rank 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from lightning_mm.analysis.hidden_states import (
    HiddenStates,
    extract_hidden_states,
    gather_hidden_states,
    in_own_dtype,
)
from lightning_mm.callbacks.subject import Subject
from lightning_mm.core.distributed import run_on_all_ranks
from lightning_mm.core.errors import UserError
from lightning_mm.data.probe_sets.probe_set import ProbeBatch, ProbeSet
from lightning_mm.execution.cache.collators import is_pixels

_HELD_BYTES = 512 * 2**20
"""Total bytes of encoded probe rows kept in memory; beyond it, rows are encoded again at every inspection."""


class Reader:
    """Extracts hidden states of the model in training, for all callbacks.

    Args:
        subject: The model and the rows to read.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject, self.probe_set = subject, subject.probe_set
        self.blank = self.probe_set.without_pictures()
        self._before: HiddenStates | None = None
        self._held: dict[str, list[ProbeBatch] | None] = {}
        self._states: dict[int, Tensor] = {}
        self._bytes = 0

    def read(self, step: int) -> tuple[HiddenStates | None, str]:
        """Hidden states of every row (rank 0 only, else None), and the failure reason, the same on every rank.

        Args:
            step: Optimizer steps done.
        """
        unchanged = self.subject.unchanged
        mine, failure = run_on_all_ranks(lambda: self._read(self.probe_set, step, "probes", self._before, unchanged))
        if mine is not None and unchanged and self._before is None:
            self._before = mine
        return self._gather(mine, failure, self.probe_set)

    def read_without_pictures(self, step: int) -> tuple[HiddenStates | None, str]:
        """``read`` of the entailment rows with grey pictures; ``(None, "")`` where there are no such rows."""
        if not len(self.blank):
            return None, ""
        mine, failure = run_on_all_ranks(lambda: self._read(self.blank, step, "without pictures", None, 0))
        return self._gather(mine, failure, self.blank)

    def _read(
        self, probe_set: ProbeSet, step: int, name: str, before: HiddenStates | None, unchanged: int
    ) -> HiddenStates:
        subject = self.subject
        begin = None if subject.own_plan else in_own_dtype(subject.mm, subject.device)
        if name == "probes" and subject.prefix is not None:
            begin = self._from_trainable_block
        with subject.evaluating():
            return extract_hidden_states(
                subject.mm,
                self._encoded(probe_set, name),
                subject.device,
                step=step,
                before=before,
                unchanged=unchanged,
                begin=begin,
            )

    @contextmanager
    def _from_trainable_block(self, batch: ProbeBatch) -> Iterator[ProbeBatch]:
        """Cache the input of the lowest trainable block at the first inspection; later ones start from it."""
        prefix, device = self.subject.prefix, self.subject.device
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
            self.subject.rejected.add(replace(each, kind="probe") for each in mine.rejected)
            whole, failure = run_on_all_ranks(lambda: gather_hidden_states(mine, probe_set))
        return whole, f"{failure.what} {failure.why}" if isinstance(failure, UserError) else failure

    def _encoded(self, probe_set: ProbeSet, name: str) -> Iterator[ProbeBatch]:
        """This rank's batches; cached while small, since encoding costs as much as the forward pass."""
        if held := self._held.get(name):
            yield from held
            return
        kept: list[ProbeBatch] | None = None if name in self._held else []
        size = 0
        for batch in self.subject.batches(probe_set):
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
