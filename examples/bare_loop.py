"""A training loop of your own with a policy and two looks inside.

Usage: python examples/bare_loop.py [FOLDER]
FOLDER holds model/, train.json and probes.json; tiny ones are made if it does not exist.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lightning_mm import (
    IntermediateOnly,
    apply_policy,
    compare_hidden_states,
    probe_hidden_states,
    read_hidden_states,
    save_findings,
)
from lightning_mm.testing import build_tiny, build_tiny_data


def main(folder: Path) -> None:
    """Train the middle layers for four steps, and compare every layer with itself."""
    if not folder.exists():
        build_tiny("llava", folder / "model")
        build_tiny_data(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    processor = AutoProcessor.from_pretrained(folder / "model")
    plan = apply_policy(model, IntermediateOnly("25%-50%"))
    print("layers that train:", plan.layers)

    before = read_hidden_states(model, processor, folder / "probes.json")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    rows = json.loads((folder / "train.json").read_text())[:4]
    for step, row in enumerate(rows, 1):
        text = row["conversations"][0]["value"] + row["conversations"][1]["value"]
        inputs = processor(text=text, images=Image.open(folder / row["image"]), return_tensors="pt")
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")

    after = read_hidden_states(model, processor, folder / "probes.json", step=len(rows))
    drift = compare_hidden_states(before, after)
    for layer, row in drift.profile("drift_cka", "picture").items():
        if row.value is not None:  # undefined where all rows are alike, as at the embeddings of the last token
            print(f"layer {layer}: CKA with the start {row.value:.4f}")
    found = [probe_hidden_states(before), probe_hidden_states(after), drift]
    print("report:", save_findings(folder / "looked-into", *found, model=model))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tiny"))
