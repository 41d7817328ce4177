"""What each policy trains and costs, counted on the nano model: python scripts/policy_table.py [MODEL] [DATA].

Share of weights from the census; share of floating-point operations of one training step from torch's counter, over
one batch of real conversations, with the attention that the counter can see (eager).
"""

import sys

from torch.utils.flop_counter import FlopCounterMode

from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.loading import Backbone
from lightning_mm.module import MMModule
from lightning_mm.tuning import (
    ConnectorOnly,
    EarlyLayers,
    Full,
    IntermediateOnly,
    LateLayers,
    LoRAOnMiddle,
    RandomLayers,
    TuningPolicy,
    UniformSparse,
)

POLICIES = (
    Full(),
    IntermediateOnly(),
    LoRAOnMiddle(),
    ConnectorOnly(),
    EarlyLayers(),
    LateLayers(),
    UniformSparse(),
    RandomLayers(),
)


def cost(model: str, policy: TuningPolicy, batch: Batch) -> tuple[MMModule, int]:
    """The configured module, and the operations of one forward and backward pass."""
    module = MMModule(Backbone(path=model, attention="eager"), policy)
    module.configure_model()
    with FlopCounterMode(display=False) as counter:
        module.objective(batch).nll.backward()
    return module, int(counter.get_total_flops())


def main(model: str = "nano/model", data: str = "nano/data/train.json") -> None:
    """Print the table as Markdown."""
    source = MMDataModule(train=data, batch_size=4, num_workers=0, processor=model)
    source.setup("fit")
    batch = next(iter(source.train_dataloader()))
    print("| policy | trains | weights | FLOPs of a step |\n|---|---|---|---|")
    full = 0
    for policy in POLICIES:
        module, flops = cost(model, policy, batch)
        full = full or flops
        census = module.census
        trains = ", ".join(row.region for row in census.rows if row.trainable)
        print(f"| `{type(policy).__name__}` | {trains} | {census.trainable / census.total:.1%} | {flops / full:.0%} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
