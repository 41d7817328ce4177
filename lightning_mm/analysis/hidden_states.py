"""Hidden states of all layers for a probe set, pooled to one vector per row and token position.

Pooling happens inside the forward hook, so that only pooled vectors are kept.

Data flow: batches of probe rows -> one forward pass each, without head and loss -> hook of each layer -> ``pool``:
(B, L, D) to (B, S, D) -> vectors by position -> gathered from all ranks on rank 0, in the order of the rows ->
``HiddenStates`` -> ``analysis.probing``, ``analysis.geometry``, ``analysis.drift``.

Shapes: T slices (embeddings and the output of each block), N vectors of one position, D hidden size, B rows of a batch,
S sites per row (last token, mean of the image tokens, ...), L tokens.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.distributed import gather_object
from lightning_mm.core.errors import UserError
from lightning_mm.data.probe_sets.probe_set import ProbeBatch, ProbeSet
from lightning_mm.data.sample import Rejection
from lightning_mm.execution.loss import select_positions_before_head
from lightning_mm.geometry.representations import exact_products
from lightning_mm.models.handle import MultimodalModel, unwrap_model
from lightning_mm.models.hooks import block_io

ROLE_SITES: Mapping[str, tuple[str, ...]] = {
    "entailment": ("last",),
    "picture": ("last", "image", "token", "object"),
    "text": ("last", "text", "token"),
    "text_last": ("token",),
    "picture_last": ("token",),
}
"""Sites that are kept of each role of row. A position is written ``role/site``, such as ``picture/last``."""

SITES: Mapping[str, str] = {"picture": "picture/last", "text": "text/last", "image": "picture/image"}
"""Site of single-modality measures and of drift -> the position it is measured at."""

ForwardContext = Callable[[ProbeBatch], AbstractContextManager[ProbeBatch]]

SampleId = tuple[str, int]
"""Row id of a vector, and which of the row's objects it stands for (0 where the row has one vector)."""


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """Pooled hidden states of a probe set.

    Args:
        step: Optimizer steps done.
        features: Position -> (T, N, D) float32 on the CPU.
        sample_index: Position -> where each of its N vectors comes from, in the order of the probe set.
        rejected: Rows that could not be processed.
        probe_set: The rows that were read, where the reader keeps them (``read_hidden_states`` does); else None.
    """

    step: int
    features: Mapping[str, Tensor]
    sample_index: Mapping[str, tuple[SampleId, ...]]
    rejected: tuple[Rejection, ...] = ()
    probe_set: ProbeSet | None = None

    def __repr__(self) -> str:
        """One line per position, without the numbers."""
        shapes = "".join(f"\n  {name}: {tuple(value.shape)}" for name, value in self.features.items())
        return f"HiddenStates(step={self.step}, {len(self.rejected)} rows rejected){shapes}"

    @property
    def num_slices(self) -> int:
        """T. Raises UserError where no row could be processed."""
        if not self.features:
            raise UserError(
                "None of the probe rows could be read.",
                "; ".join(self.problems) or "The probe set is empty.",
                "Mend the probe file, or raise max_length where rows are too long.",
            )
        return next(iter(self.features.values())).shape[0]

    @property
    def problems(self) -> tuple[str, ...]:
        """Rejected rows counted by reason, the most frequent first."""
        reasons = Counter(each.reason.partition(":")[0] for each in self.rejected)
        first = {each.reason.partition(":")[0]: each for each in reversed(self.rejected)}
        return tuple(
            f"probe rows with '{reason}': {count}, such as {first[reason].origin} ({first[reason].reason})"
            for reason, count in reasons.most_common()
        )


def pool(hidden_BLD: Tensor, weights_BSL: Tensor) -> Tensor:
    """Weighted means over tokens, in float32 whatever the model computes in.

    Tokens without weight may hold anything, NaN too: rows of padding are undefined under some attention kernels.

    Args:
        hidden_BLD: A layer's hidden states, of any floating type.
        weights_BSL: Row-normalized weights; all zero where a row has no such site.

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


def extract_hidden_states(
    mm: MultimodalModel,
    batches: Iterable[ProbeBatch],
    device: torch.device,
    *,
    step: int = 0,
    before: HiddenStates | None = None,
    unchanged: int = 0,
    begin: ForwardContext | None = None,
) -> HiddenStates:
    """Hidden states of this rank's rows. The caller sets eval mode, no_grad, precision and random state.

    Args:
        mm: The model, wrapped (DDP, FSDP) or not.
        batches: This rank's share of the probe set.
        device: Where the model is.
        step: Optimizer steps done, recorded in the result.
        before: Earlier hidden states of the same rows on this rank; None computes all slices.
        unchanged: Number of slices, from the embeddings up, that are copied from ``before`` because no weight below
            them has changed.
        begin: Context manager around each forward pass that returns the batch to run; None runs the batch as it is.
    """
    if before is not None and unchanged > mm.layout.num_layers:
        return replace(before, step=step)
    mm = replace(mm, model=unwrap_model(mm.model))
    first = unchanged if before is not None else 0
    vectors: dict[str, list[Tensor]] = {}
    samples: dict[str, list[SampleId]] = {}
    rejected: list[Rejection] = []
    for batch in batches:
        rejected += batch.rejected
        if not len(batch):
            continue
        with nullcontext(batch.to(device)) if begin is None else begin(batch) as given:
            pooled_TBSD = _forward(mm, given, first)
        for position, sample, b, s in _present_sites(batch):
            vectors.setdefault(position, []).append(pooled_TBSD[:, b, s])
            samples.setdefault(position, []).append(sample)
    features = {position: torch.stack(columns, 1) for position, columns in vectors.items()}
    if first and before is not None:
        assert all(before.sample_index[position] == tuple(found) for position, found in samples.items())
        features = {position: torch.cat([before.features[position][:first], x]) for position, x in features.items()}
    sample_index = {position: tuple(found) for position, found in samples.items()}
    return HiddenStates(step, features, sample_index, tuple(rejected))


def in_own_dtype(mm: MultimodalModel, device: torch.device) -> ForwardContext:
    """Give a model in half or double precision its pixels in that type: not every model converts them."""
    dtype = mm.transformers.dtype

    @contextmanager
    def begin(batch: ProbeBatch) -> Iterator[ProbeBatch]:
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.inputs.items()}
        yield replace(batch, inputs=inputs).to(device)

    return begin


def _forward(mm: MultimodalModel, batch: ProbeBatch, first: int) -> Tensor:
    """(T - first, B, S, D) pooled hidden states, on the CPU."""
    taken: dict[int, Tensor] = {}
    below: list[Tensor] = []

    def receive(index: int, hidden_BLD: Tensor) -> None:
        if index < first:
            below[:] = [hidden_BLD]
        else:
            # Of a model spread over devices (device_map), each block has its own.
            taken[index] = pool(hidden_BLD, batch.weights.to(hidden_BLD.device)).to(batch.weights.device)

    no_position = torch.zeros(1, dtype=torch.long, device=batch.weights.device)
    with block_io(mm, receive), select_positions_before_head(mm.model.get_submodule(mm.layout.head), no_position):
        mm.model(**batch.inputs, use_cache=False)
    wanted = range(first, mm.layout.num_layers + 1)
    skipped = [index for index in wanted if index not in taken]
    for index in skipped:  # a block that is left out is the identity: its slice is the one below
        assert index - 1 in taken or below, "the lowest block was not run"
        taken[index] = taken[index - 1] if index - 1 in taken else pool(below[0], batch.weights)
    if skipped:
        blocks = ", ".join(str(index - 1) for index in skipped)
        log_decision(
            "inspection.blocks", f"{blocks} pass on what they get", "rows without a picture skip cross-attention"
        )
    return torch.stack([taken[index] for index in wanted]).cpu()


def _present_sites(batch: ProbeBatch) -> Iterable[tuple[str, SampleId, int, int]]:
    """(position, sample, row b, site s) of every site that a row of the batch has tokens for."""
    present_BS = batch.weights.ne(0).any(-1).tolist()
    for b, (row, sites) in enumerate(zip(batch.rows, batch.sites, strict=True)):
        for s, site in enumerate(sites):
            kind, _, number = site.partition(":")
            if kind in ROLE_SITES[row.role] and present_BS[b][s]:
                yield f"{row.role}/{kind}", (row.id, int(number or 0)), b, s


def gather_hidden_states(states: HiddenStates, probe_set: ProbeSet) -> HiddenStates | None:
    """The rows of all ranks on rank 0, each once and in the probe set's order; None on the other ranks."""
    parts = gather_object(states)
    return None if parts is None else merge_hidden_states(parts, probe_set)


def merge_hidden_states(parts: Sequence[HiddenStates], probe_set: ProbeSet) -> HiddenStates:
    """Hidden states of the same step as one, each row once and in the probe set's order.

    Args:
        parts: One or more, of any rows of the set.
        probe_set: The rows.
    """
    order = {row.id: index for index, row in enumerate(probe_set.rows)}
    features, sample_index = {}, {}
    for position in sorted({position for part in parts for position in part.features}):
        having = [part for part in parts if position in part.features]
        samples = [sample for part in having for sample in part.sample_index[position]]
        first_index = {sample: index for index, sample in reversed(list(enumerate(samples)))}
        unique = sorted(first_index, key=lambda sample: (order[sample[0]], sample[1]))
        x_TND = torch.cat([part.features[position] for part in having], 1)
        features[position] = x_TND[:, [first_index[sample] for sample in unique]]
        sample_index[position] = tuple(unique)
    return HiddenStates(parts[0].step, features, sample_index, tuple(r for part in parts for r in part.rejected))


def common_samples(one: HiddenStates, other: HiddenStates) -> tuple[HiddenStates, HiddenStates, int]:
    """Both hidden states restricted to the samples that both have, and the number of rows that this leaves out."""
    if one.sample_index == other.sample_index:
        return one, other, 0
    common = {
        position: set(ids) & set(other.sample_index.get(position, ())) for position, ids in one.sample_index.items()
    }
    common = {position: ids for position, ids in common.items() if ids}

    def restricted(states: HiddenStates) -> HiddenStates:
        chosen = {p: [i for i, sample in enumerate(states.sample_index[p]) if sample in common[p]] for p in common}
        return replace(
            states,
            features={p: states.features[p][:, at] for p, at in chosen.items()},
            sample_index={p: tuple(states.sample_index[p][i] for i in at) for p, at in chosen.items()},
        )

    differing = {
        row
        for position in one.sample_index.keys() & other.sample_index.keys()
        for row, _ in set(one.sample_index[position]) ^ set(other.sample_index[position])
    }
    return restricted(one), restricted(other), len(differing)
