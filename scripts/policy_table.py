"""What each policy trains and costs, on the nano model: python scripts/policy_table.py [MODEL DATA] [--json FILE].

The same counts as ``lightning-mm plan``'s, over one batch of real conversations without its padding; tests hold them
against torch's own counter in a real step.
"""

import json
import sys
from pathlib import Path

from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.loading import Backbone
from lightning_mm.planning.cost_estimate import MetaModel, RunSettings, estimate_cost
from lightning_mm.planning.devices import DEVICES
from lightning_mm.verbs.plan import POLICIES


def main(model: str = "nano/model", data: str = "nano/data/train.json", out: Path | None = None) -> None:
    """Print the table as Markdown; with ``--json FILE`` write it down for ``readme_numbers.py`` too."""
    source = MMDataModule(train=data, batch_size=4, num_workers=0, processor=model)
    source.setup("fit")
    batch = next(iter(source.train_dataloader()))
    blueprint = MetaModel(Backbone(path=model), batch)
    print("| policy | trains | weights | FLOPs of a step |\n|---|---|---|---|")
    full, rows = 0.0, []
    for policy in POLICIES:
        told = estimate_cost(blueprint, policy, [batch], RunSettings(), DEVICES["h200"])
        full = full or told.flops.floor
        trains = ", ".join(row.region for row in told.census.rows if row.trainable).replace(", layers ", ", ")
        share = told.census.trainable / told.census.total
        name, flops = type(policy).__name__, told.flops.floor / full
        rows.append({"policy": name, "trains": trains, "weights": share, "flops": flops})
        print(f"| `{name}` | {trains} | {share:.1%} | {flops:.0%} |")
    if out is not None:
        out.write_text(json.dumps({"policies": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    given, _, file = " ".join(sys.argv[1:]).partition("--json ")
    main(*given.split(), out=Path(file) if file else None)
