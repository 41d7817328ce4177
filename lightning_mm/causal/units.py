"""What is put back together in one go, and what is computed together.

Data flow: clean run + corrupt run -> units: tokens, or runs of a picture's tokens -> batches of them.

Shapes: U units, R units of a batch, P positions of the longest, L tokens.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_mm.causal.questions import Asked
from lightning_mm.causal.recording import Recording
from lightning_mm.errors import UserError


def units_of(asked: Asked, clean: Recording, base: Recording, image_units: int) -> list[Tensor]:
    """Runs of tokens from the first changed one on: each token of the text, the picture's in ``image_units`` runs."""
    # In all layers: where attention reads the picture from outside, embeddings do not know that it has changed.
    layers = [(clean.entered[layer] != base.entered[layer]).any(-1)[0] for layer in clean.entered]
    changed = torch.stack(layers).any(0).nonzero().flatten()
    if not len(changed):
        raise UserError(
            "The corruption changes nothing.", "Both runs are the same in all layers.", "Choose another corruption."
        )
    first, pictured = int(changed[0]), asked.image.tolist()
    late = [position for position in pictured if position >= first]
    runs = [run for run in torch.tensor(late).tensor_split(image_units) if len(run)] if late else []
    text = [torch.tensor([position]) for position in range(first, asked.length) if position not in set(pictured)]
    return sorted([*runs, *text], key=lambda unit: int(unit[0]))


def batches(jobs: Sequence[int], units: Sequence[Tensor], length: int, tokens: int) -> Iterator[list[int]]:
    """Units that are computed together, at most so many tokens: later ones need fewer each."""
    held: list[int] = []
    for unit in jobs:
        span = length - int(units[held[0] if held else unit][0])
        if held and (len(held) + 1) * span > tokens:
            yield held
            held = []
        held.append(unit)
    if held:
        yield held


def padded(units: Sequence[Tensor]) -> Tensor:
    """(R, P) positions; a shorter unit names its last token again."""
    longest = max(map(len, units))
    return torch.stack([torch.cat([unit, unit[-1:].expand(longest - len(unit))]) for unit in units])
