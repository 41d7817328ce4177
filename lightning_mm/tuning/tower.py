"""The vision tower cut at the features that are read: blocks above them are computed by the family's code, and dropped.

Data flow: an example batch -> the model's logits with and without the tower's last block, last two, ... -> the blocks
that change nothing, passed by from then on (LLaVA reads the last but one).
"""

import torch
from torch import Tensor, nn

from lightning_mm.data.batch import Batch
from lightning_mm.decisions import decide
from lightning_mm.models.anatomy import Anatomy
from lightning_mm.objective import gathered_before
from lightning_mm.tuning.prefix import outputs_of, pass_by, passed_by


@torch.no_grad()
def cut_tower(model: nn.Module, anatomy: Anatomy, batch: Batch) -> tuple[str, ...]:
    """Pass by the vision blocks that nothing reads, in place; returns their names, top first.

    Args:
        model: The plain model, on the batch's device.
        anatomy: Of it.
        batch: With pictures; without any, nothing is cut.
    """
    if not batch.has_images or not anatomy.vision_blocks:
        return ()
    head = model.get_submodule(anatomy.head)

    def logits() -> Tensor:
        with gathered_before(head, batch.supervised):
            return model(**batch.inputs, use_cache=False).logits

    cut: list[str] = []
    with torch.random.fork_rng():
        last = model.get_submodule(anatomy.vision_blocks[-1])
        with outputs_of(last) as outputs:
            expected = logits()
        in_tuple = bool(outputs) and isinstance(outputs[0], tuple)
        for name in reversed(anatomy.vision_blocks):
            blocks = [model.get_submodule(each) for each in (*cut, name)]
            with passed_by(blocks, in_tuple):
                if not torch.equal(logits(), expected):
                    break
            cut.append(name)
    if cut:
        pass_by([model.get_submodule(name) for name in cut], in_tuple)
        decide("vision tower", f"{len(cut)} of {len(anatomy.vision_blocks)} blocks left out", "nothing reads them")
    return tuple(cut)
