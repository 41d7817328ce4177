"""What each policy trains and costs, on the nano model: python scripts/policy_table.py [MODEL] [DATA].

The same counts as ``lightning-mm plan``'s, over one batch of real conversations without its padding; tests hold them
against torch's own counter in a real step.
"""

import sys

from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.loading import Backbone
from lightning_mm.planning.cost_estimate import MetaModel, RunSettings, estimate_cost
from lightning_mm.planning.devices import DEVICES
from lightning_mm.verbs.plan import POLICIES


def main(model: str = "nano/model", data: str = "nano/data/train.json") -> None:
    """Print the table as Markdown."""
    source = MMDataModule(train=data, batch_size=4, num_workers=0, processor=model)
    source.setup("fit")
    batch = next(iter(source.train_dataloader()))
    blueprint = MetaModel(Backbone(path=model), batch)
    print("| policy | trains | weights | FLOPs of a step |\n|---|---|---|---|")
    full = 0.0
    for policy in POLICIES:
        told = estimate_cost(blueprint, policy, [batch], RunSettings(), DEVICES["h200"])
        full = full or told.flops.floor
        trains = ", ".join(row.region for row in told.census.rows if row.trainable).replace(", layers ", ", ")
        share = told.census.trainable / told.census.total
        print(f"| `{type(policy).__name__}` | {trains} | {share:.1%} | {told.flops.floor / full:.0%} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
