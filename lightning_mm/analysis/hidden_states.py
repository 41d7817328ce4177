"""A reading: what every layer holds of every probe row, at the sites that the analyses ask for.

Data flow: batches of probe rows -> one forward pass each, head and loss left out -> ``tap`` -> ``pooling`` -> vectors
by place -> gathered from all ranks to the first, in the order of the rows -> ``analysis``.

Shapes: T slices (embeddings and blocks), N vectors of one place, D hidden size, B rows of a batch, S sites, L tokens.

Hidden states of all tokens into one vector per site, inside the hook, so that only pooled vectors are kept.

Data flow: (B, L, D) of one layer + pooling weights of the batch -> (B, S, D) float32.

Shapes: B rows, L tokens, D hidden size, S sites per row (last token, mean of the image's tokens, ...).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mm.core.decisions import decide
from lightning_mm.core.distributed import gather_object
from lightning_mm.core.errors import UserError
from lightning_mm.data.probe_sets.probe_set import ProbeBatch, ProbeSet
from lightning_mm.data.sample import Rejection
from lightning_mm.execution.loss import gathered_before
from lightning_mm.geometry.representations import exact_products
from lightning_mm.models.handle import MultimodalModel, unwrap_model
from lightning_mm.models.hooks import block_io


def pool(hidden_BLD: Tensor, weights_BSL: Tensor) -> Tensor:
    """Weighted means over tokens, in float32 whatever the model computes in.

    A token that no site reads may hold anything, NaN too (rows of padding are undefined under some attention kernels).

    Args:
        hidden_BLD: A layer's hidden states, of any floating type.
        weights_BSL: Row-normalised weights; all zero where a row has no such site.

    Returns:
        (B, S, D) float32. A site of one token is that token's vector, exactly.

    Raises:
        UserError: The hidden states are not one vector per token of each row.

    Example:
        >>> pool(torch.tensor([[[1.0], [3.0], [float("nan")]]]), torch.tensor([[[0.5, 0.5, 0.0]]])).item()
        2.0
    """
    batch, length = weights_BSL.shape[0], weights_BSL.shape[2]
    if hidden_BLD.ndim != 3 or hidden_BLD.shape[:2] != (batch, length):
        raise UserError(
            "The decoder's hidden states cannot be read.",
            f"A block gives {tuple(hidden_BLD.shape)} for {batch} rows of {length} tokens, not one vector per token.",
            "Models with several streams per token (Gemma 3n) cannot be looked into; take the callbacks off.",
        )
    read_BL = weights_BSL.ne(0).any(1)
    used_BLD = torch.where(read_BL[:, :, None], hidden_BLD.detach().float(), 0.0)
    with exact_products():
        return weights_BSL.float() @ used_BLD


PLACES: Mapping[str, tuple[str, ...]] = {
    "entailment": ("last",),
    "picture": ("last", "image", "token", "object"),
    "text": ("last", "text", "token"),
}
"""Which sites are kept of each role of row; a place is written ``role/site``."""

Begin = Callable[[ProbeBatch], AbstractContextManager[ProbeBatch]]

Address = tuple[str, int]
"""A vector's row id, and which of the row's objects it stands for (0 where there is but one vector)."""


@dataclass(frozen=True, eq=False)
class Reading:
    """Hidden states of a probe set.

    Args:
        step: Optimizer steps done.
        features: Place -> (T, N, D) float32 on the CPU.
        addresses: Place -> where each of its N vectors comes from, in the order of the probe set.
        rejected: Rows that could not be read.
    """

    step: int
    features: Mapping[str, Tensor]
    addresses: Mapping[str, tuple[Address, ...]]
    rejected: tuple[Rejection, ...] = ()

    @property
    def num_slices(self) -> int:
        """T. Raises UserError where no row could be read."""
        if not self.features:
            raise UserError(
                "None of the probe rows could be read.",
                "; ".join(self.problems) or "The probe set is empty.",
                "Mend the probe file, or raise max_length where rows are too long.",
            )
        return next(iter(self.features.values())).shape[0]

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be read, counted by reason, the most frequent first."""
        reasons = Counter(each.reason.partition(":")[0] for each in self.rejected)
        first = {each.reason.partition(":")[0]: each for each in reversed(self.rejected)}
        return tuple(
            f"probe rows with '{reason}': {count}, such as {first[reason].origin} ({first[reason].reason})"
            for reason, count in reasons.most_common()
        )


def read(
    mm: MultimodalModel,
    batches: Iterable[ProbeBatch],
    device: torch.device,
    *,
    step: int = 0,
    before: Reading | None = None,
    unchanged: int = 0,
    begin: Begin | None = None,
) -> Reading:
    """Read this rank's rows. The caller sees to eval mode, no gradients, precision and randomness.

    Args:
        mm: Wrapped or not.
        batches: This rank's share of the probe set.
        device: Where the model is.
        step: Noted in the reading.
        before: An earlier reading of the same rows on this rank.
        unchanged: So many slices, from the embeddings up, are taken from ``before``: no weight below them has moved.
        begin: Surrounds each forward pass, and says what the model is given in it.
    """
    if before is not None and unchanged > mm.layout.num_layers:
        return replace(before, step=step)
    mm = replace(mm, model=unwrap_model(mm.model))
    first = unchanged if before is not None else 0
    vectors: dict[str, list[Tensor]] = {}
    addresses: dict[str, list[Address]] = {}
    rejected: list[Rejection] = []
    for batch in batches:
        rejected += batch.rejected
        if not len(batch):
            continue
        with nullcontext(batch.to(device)) if begin is None else begin(batch) as given:
            pooled_TBSD = _forward(mm, given, first)
        for place, address, b, s in _kept(batch):
            vectors.setdefault(place, []).append(pooled_TBSD[:, b, s])
            addresses.setdefault(place, []).append(address)
    features = {place: torch.stack(columns, 1) for place, columns in vectors.items()}
    if first and before is not None:
        assert all(before.addresses[place] == tuple(found) for place, found in addresses.items())
        features = {place: torch.cat([before.features[place][:first], x]) for place, x in features.items()}
    return Reading(step, features, {place: tuple(found) for place, found in addresses.items()}, tuple(rejected))


def shared(one: Reading, other: Reading) -> tuple[Reading, Reading, int]:
    """Two readings of one probe set without what only one of them holds, and how many rows that leaves out."""
    if one.addresses == other.addresses:
        return one, other, 0
    places = {place: set(found) & set(other.addresses.get(place, ())) for place, found in one.addresses.items()}
    places = {place: common for place, common in places.items() if common}

    def kept(reading: Reading) -> Reading:
        chosen = {place: [i for i, a in enumerate(reading.addresses[place]) if a in places[place]] for place in places}
        return replace(
            reading,
            features={place: reading.features[place][:, at] for place, at in chosen.items()},
            addresses={place: tuple(reading.addresses[place][i] for i in at) for place, at in chosen.items()},
        )

    differing = {
        row
        for place in one.addresses.keys() & other.addresses.keys()
        for row, _ in set(one.addresses[place]) ^ set(other.addresses[place])
    }
    return kept(one), kept(other), len(differing)


def _forward(mm: MultimodalModel, batch: ProbeBatch, first: int) -> Tensor:
    """(T - first, B, S, D) pooled hidden states, on the CPU."""
    taken: dict[int, Tensor] = {}
    below: list[Tensor] = []

    def receive(index: int, hidden_BLD: Tensor) -> None:
        if index < first:
            below[:] = [hidden_BLD]
        else:
            taken[index] = pool(hidden_BLD, batch.weights)

    nothing = torch.zeros(1, dtype=torch.long, device=batch.weights.device)
    with block_io(mm, receive), gathered_before(mm.model.get_submodule(mm.layout.head), nothing):
        mm.model(**batch.inputs, use_cache=False)
    wanted = range(first, mm.layout.num_layers + 1)
    skipped = [index for index in wanted if index not in taken]
    for index in skipped:  # a block that is left out is the identity: its slice is the one below
        assert index - 1 in taken or below, "the lowest block was not run"
        taken[index] = taken[index - 1] if index - 1 in taken else pool(below[0], batch.weights)
    if skipped:
        blocks = ", ".join(str(index - 1) for index in skipped)
        decide("inspection.blocks", f"{blocks} pass on what they get", "rows without a picture skip cross-attention")
    return torch.stack([taken[index] for index in wanted]).cpu()


def _kept(batch: ProbeBatch) -> Iterable[tuple[str, Address, int, int]]:
    present_BS = batch.weights.ne(0).any(-1).tolist()
    for b, (row, sites) in enumerate(zip(batch.rows, batch.sites, strict=True)):
        for s, site in enumerate(sites):
            kind, _, number = site.partition(":")
            if kind in PLACES[row.role] and present_BS[b][s]:
                yield f"{row.role}/{kind}", (row.id, int(number or 0)), b, s


def gather(reading: Reading, probe_set: ProbeSet) -> Reading | None:
    """All ranks' rows on rank 0, each once and in the probe set's order; None on the other ranks."""
    parts = gather_object(reading)
    if parts is None:
        return None
    order = {row.id: index for index, row in enumerate(probe_set.rows)}
    features, addresses = {}, {}
    for place in sorted({place for part in parts for place in part.features}):
        held = [part for part in parts if place in part.features]
        found = [address for part in held for address in part.addresses[place]]
        once = {address: index for index, address in reversed(list(enumerate(found)))}
        kept = sorted(once, key=lambda address: (order[address[0]], address[1]))
        x_TND = torch.cat([part.features[place] for part in held], 1)
        features[place] = x_TND[:, [once[address] for address in kept]]
        addresses[place] = tuple(kept)
    return Reading(reading.step, features, addresses, tuple(r for part in parts for r in part.rejected))
