"""The loss of each source of a mixture, in training and in evaluation, beside the loss of all.

Nothing of it is attached to the graph, and no micro-batch waits for the device: sums stay there until they are logged.

Data flow: ``LossOutput`` + ``Batch`` -> sums by source -> summed over ranks -> metrics under ``core.metric_names``.

Shapes: K sources, S supervised positions of a batch.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from lightning_mm.core import metric_names
from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import LossOutput


def nll_by_source(objective: LossOutput, batch: Batch) -> Iterator[tuple[str, Tensor, int]]:
    """Name, () summed NLL and number of supervised tokens of each source of a batch.

    Args:
        objective: The loss of the batch.
        batch: Its rows.
    """
    sources = batch.target_sources
    for number, (name, count) in enumerate(zip(sources.names, sources.counts, strict=True)):
        if sources.index is None:
            yield name, objective.nll.detach(), count
        else:
            yield name, torch.where(sources.index == number, objective.token_nll, 0).sum(), count


class SourceLosses:
    """Training losses by source, summed over the steps since they were last logged.

    Args:
        names: The K sources; fewer than two are not measured.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names) if len(names) > 1 else ()
        self._nll_K: Tensor | None = None
        self._tokens = dict.fromkeys(self.names, 0)
        self.keep_step()

    def keep_step(self) -> None:
        """End an optimizer step: what was added counts."""
        self._kept = (None if self._nll_K is None else self._nll_K.clone()), dict(self._tokens)

    def drop_step(self) -> None:
        """Take back what was added since the last step: its loss is not finite."""
        self._nll_K, self._tokens = self._kept

    def add(self, objective: LossOutput, batch: Batch) -> None:
        """Add a micro-batch of this rank."""
        if not self.names:
            return
        if self._nll_K is None:
            self._nll_K = torch.zeros(len(self.names), dtype=torch.float64, device=objective.nll.device)
        for name, nll, count in nll_by_source(objective, batch):
            if name in self._tokens:
                self._nll_K[self.names.index(name)] += nll
                self._tokens[name] += count

    def close(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Every metric by its name, over all ranks, of the steps since the last call; those without tokens left out.

        Args:
            total: Sums a tensor (2, K) over ranks.
        """
        if self._nll_K is None:
            return {}
        tokens_K = self._nll_K.new_tensor(list(self._tokens.values()))
        nll, tokens = total(torch.stack([self._nll_K, tokens_K])).tolist()
        self._nll_K, self._tokens = None, dict.fromkeys(self.names, 0)
        self.keep_step()
        found: dict[str, float] = {}
        for name, one_nll, count in zip(self.names, nll, tokens, strict=True):
            found[metric_names.token_share(name)] = count / max(1.0, sum(tokens))
            if count:
                found[metric_names.source_loss("train", name)] = one_nll / count
        return found


class SourceScores(nn.Module):
    """Losses by source on one split, as torchmetrics that sum over ranks.

    Args:
        names: The K sources, the same on every rank; fewer than two are not measured.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.names = tuple(names) if len(names) > 1 else ()
        self._nll = [SumMetric() for _ in self.names]
        self._tokens = [SumMetric() for _ in self.names]
        self.metrics = nn.ModuleList([*self._nll, *self._tokens])

    def add(self, objective: LossOutput, batch: Batch) -> None:
        """Count a teacher-forced batch."""
        if not self.names:
            return
        for name, nll, count in nll_by_source(objective, batch):
            if name in self.names:
                self._nll[self.names.index(name)].update(nll)
                self._tokens[self.names.index(name)].update(float(count))

    def compute(self, split: metric_names.Stage) -> dict[str, float]:
        """Every metric by its name, over all ranks; a source without tokens is left out."""
        with warnings.catch_warnings():
            # A rank may have met no row of some source: its zero is what the sum over ranks needs.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric SumMetric was called before")
            nll = [float(metric.compute()) for metric in self._nll]
            tokens = [float(metric.compute()) for metric in self._tokens]
        parts = zip(self.names, nll, tokens, strict=True)
        return {metric_names.source_loss(split, name): each / count for name, each, count in parts if count}
