"""Data loaders whose order depends only on (seed, epoch) and can be resumed within an epoch.

Training: one permutation per epoch (of all samples, or of those that a mixture of sources gives to the epoch),
distributed over the ranks by stride. Where samples do not divide by the number of ranks, the first ones of the
permutation are repeated, so that all ranks have equally many batches; none is dropped.
Evaluation: file order, each sample exactly once over all ranks.

Data flow: dataset -> sampler -> (workers: dataset[i], collate) -> training or evaluation loop. A training loader's
``state_dict`` is saved in the checkpoint by Lightning and restored by ``load_state_dict``.
"""

import time
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.distributed import rank_and_world_size
from lightning_mm.core.errors import UserError
from lightning_mm.core.processes import worker_killed_error
from lightning_mm.data.mixture import Mixture
from lightning_mm.data.order_seed import order_seed

Collate = Callable[[list[Any]], Any]
_POSITION = ("epoch", "batches", "num_batches")


class EpochSampler(Sampler[int]):
    """One rank's share of the epoch's permutation.

    Args:
        num_samples: Number of samples of the whole dataset.
        seed: Random seed of the order, together with the epoch.
        rank: Rank of this process.
        world_size: Number of ranks.
        mixture: Which samples an epoch holds, of several sources; None: each once.

    Attributes:
        num_samples: Number of samples of an epoch.
        epoch: Current epoch.
        skip: Number of samples (or batches) that the next iterator leaves out.
    """

    def __init__(
        self, num_samples: int, seed: int, rank: int = 0, world_size: int = 1, mixture: Mixture | None = None
    ) -> None:
        self.mixture = None if mixture is None or mixture.is_plain else mixture
        self.num_samples = num_samples if self.mixture is None else self.mixture.num_rows
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls it at the start of an epoch, after asking for the first iterator."""
        self.epoch = epoch

    def rows(self, epoch: int) -> Tensor:
        """(N,) samples of an epoch before they are shuffled, as indices into the dataset."""
        if self.mixture is None:
            return torch.arange(self.num_samples)
        return torch.from_numpy(self.mixture.rows(epoch))

    def identity(self) -> dict[str, Any]:
        """What the order depends on, by name."""
        found = {"seed": self.seed, "num_samples": self.num_samples, "world_size": self.world_size}
        return found if self.mixture is None else {**found, "mixture": str(self.mixture)}

    def num_batches(self, batch_size: int | None, epoch: int) -> int:
        """Batches of an epoch; -1 where that is not known.

        Args:
            batch_size: Samples of a batch; None: the sampler yields batches.
            epoch: Number of the epoch; all have as many, unless they are streamed.
        """
        return -(-len(self) // (batch_size or 1))

    def __len__(self) -> int:
        return -(-self.num_samples // self.world_size)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(order_seed(self.seed, self.epoch))
        order = self.rows(self.epoch)[torch.randperm(self.num_samples, generator=generator)]
        dealt = order[torch.arange(self.rank, len(self) * self.world_size, self.world_size) % self.num_samples]
        yield from dealt[self.skip :].tolist()


class ShardSampler(Sampler[int]):
    """One rank's share of a dataset in file order: every sample exactly once over all ranks."""

    def __init__(self, num_samples: int, rank: int = 0, world_size: int = 1) -> None:
        self._share = range(rank, num_samples, world_size)

    def __len__(self) -> int:
        return len(self._share)

    def __iter__(self) -> Iterator[int]:
        return iter(self._share)


class _ReturnUserErrors:
    """A collate function that returns UserErrors: raised in a worker, torch would reduce them to text."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        try:
            return self.collate(rows)
        except UserError as error:
            return error


class CheckedDataLoader(DataLoader[Any]):
    """A DataLoader that raises the UserErrors of its workers, and one where a worker was killed.

    Attributes:
        waited: Seconds spent waiting for batches, including the start of the workers.
    """

    waited: float = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # Lightning needs an iterator only
        try:
            began = time.perf_counter()
            for batch in super().__iter__():
                self.waited += time.perf_counter() - began
                if isinstance(batch, UserError):
                    raise batch
                yield batch
                began = time.perf_counter()
        except RuntimeError as error:
            if (killed := worker_killed_error(error)) is None:
                raise
            raise killed from error


class ResumableDataLoader(CheckedDataLoader):
    """A training loader with a position (epoch, batches done) that can be saved and restored.

    An iterator starts at the restored position if that is of its epoch, and at the beginning otherwise. It decides so
    at its first batch: on a restart Lightning makes the iterator before it sets the epoch.

    Attributes:
        fingerprint: Digest of the content of the dataset; 0: not known.
        processed: Returns how many batches of this epoch the loop has finished, since a batch that was handed out but
            whose step failed is not done; None counts the batches handed out.
    """

    processed: Callable[[], int] | None = None
    fingerprint: int = 0
    _place: tuple[int, int] = (0, 0)
    _resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # as in GuardedLoader
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # a sequential one with Lightning's overfit_batches
            yield from super().__iter__()
            return
        epoch = sampler.epoch
        done = self._resume[1] if self._resume and self._resume[0] == epoch else 0
        self._place, self._resume = (epoch, done), None
        sampler.skip = done * (self.batch_size or 1)  # without a batch_size, the sampler counts batches
        assert self.generator is not None
        self.generator.manual_seed(order_seed(sampler.seed, epoch))
        for batch in super().__iter__():
            done += 1
            self._place = (epoch, done)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the order depends on."""
        epoch, done = self._resume or self._place
        if self.processed is not None and self._resume is None:
            done = min(done, self.processed())
        sampler = self.sampler
        known = sampler.num_batches(self.batch_size, epoch) if isinstance(sampler, EpochSampler) else len(self)
        return {"epoch": epoch, "batches": done, "num_batches": known, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position of a checkpoint.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            UserError: The checkpoint is within an epoch that this loader would order differently.
        """
        identity = self._identity()
        keys = [key for key in {**identity, **state} if key not in _POSITION]
        changed = {key: (state.get(key), identity.get(key)) for key in keys if state.get(key) != identity.get(key)}
        if changed and state["batches"] != state["num_batches"]:
            changes = "; ".join(
                "the rows of data.train differ, or their order" if key == "rows" else f"{key} was {old}, is {new}"
                for key, (old, new) in changed.items()
            )
            of = f" of {state['num_batches']}" if state["num_batches"] >= 0 else ""
            raise UserError(
                f"The checkpoint's order of samples cannot be continued: it stopped at batch {state['batches']}{of} of "
                f"epoch {state['epoch']}.",
                f"Samples would be lost or seen twice: {changes}.",
                "Resume with the same data (sources with their weights, repeats and limits, data.temperature), model, "
                "data.seed, data.batch_size, data.max_tokens, data.group_by_length and number of devices, or from the "
                "end of an epoch.",
            )
        epoch, done = state["epoch"], state["batches"]
        sampler = self.sampler
        if isinstance(sampler, EpochSampler):
            # Of a loader without a length Lightning takes the first batch before it sets the epoch.
            if done == state["num_batches"] and sampler.num_batches(self.batch_size, epoch) < 0:
                epoch, done = epoch + 1, 0
            sampler.set_epoch(epoch)
        self._resume = (epoch, done)

    def _identity(self) -> dict[str, Any]:
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):
            return {}
        return {"rows": self.fingerprint, "batch_size": self.batch_size or 0, **sampler.identity()}


def training_loader(
    dataset: Sequence[Any],
    collate: Collate,
    *,
    batch_size: int,
    seed: int = 0,
    num_workers: int = 0,
    fingerprint: int = 0,
    mixture: Mixture | None = None,
) -> ResumableDataLoader:
    """The training loader of this rank (of torch.distributed).

    Args:
        dataset: The samples.
        collate: Makes a batch of a list of samples.
        batch_size: Samples per batch of one rank.
        seed: Random seed of the order.
        num_workers: Number of worker processes.
        fingerprint: Digest of the content of the dataset, which a checkpoint is resumed with; 0: not known.
        mixture: Which samples an epoch holds; None: each once.
    """
    rank, world_size = rank_and_world_size()
    sampler = EpochSampler(len(dataset), seed, rank, world_size, mixture)
    log_repeated(-sampler.num_samples % world_size, sampler)
    loader = ResumableDataLoader(**loader_options(dataset, collate, sampler, batch_size, num_workers))
    loader.fingerprint = fingerprint
    return loader


def log_repeated(num_repeated: int, sampler: EpochSampler) -> None:
    """Say how many samples an epoch repeats so that all ranks have as many batches, if any.

    Args:
        num_repeated: Number of samples.
        sampler: Whose epochs.
    """
    if num_repeated:
        log_decision(
            "data.train",
            f"{num_repeated} samples are seen twice in each epoch",
            f"{sampler.num_samples} samples do not divide by {sampler.world_size} ranks, and all ranks need as many "
            "batches",
        )


def evaluation_loader(
    dataset: Sequence[Any], collate: Collate, *, batch_size: int, num_workers: int = 0
) -> CheckedDataLoader:
    """The evaluation loader of this rank (of torch.distributed).

    Args:
        dataset: The samples.
        collate: Makes a batch of a list of samples.
        batch_size: Samples per batch of one rank.
        num_workers: Number of worker processes.

    Raises:
        UserError: There are fewer samples than ranks: a rank without a batch would block the others.
    """
    rank, world_size = rank_and_world_size()
    if len(dataset) < world_size:
        raise UserError(
            f"{len(dataset)} samples cannot be evaluated on {world_size} devices.",
            "Each device needs at least one.",
            "Use fewer devices, or more samples.",
        )
    return CheckedDataLoader(
        **loader_options(dataset, collate, ShardSampler(len(dataset), rank, world_size), batch_size, num_workers)
    )


def loader_options(
    dataset: Sized, collate: Collate, sampler: Sampler[Any], batch_size: int | None, num_workers: int
) -> dict[str, Any]:
    """Arguments of a DataLoader; with ``batch_size`` None the sampler yields whole batches."""
    return {
        "dataset": cast(Dataset[Any], dataset),
        "sampler": sampler,
        "batch_size": batch_size,
        "collate_fn": _ReturnUserErrors(collate),
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        # The workers' base seeds must not be drawn from the global generator, which dropout uses.
        "generator": torch.Generator().manual_seed(0),
    }
