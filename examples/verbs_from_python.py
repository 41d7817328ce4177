"""Plan, inspect, choose layers, trace, edit and export as functions: python examples/verbs_from_python.py [FOLDER]

FOLDER holds model/, train.json and probes.json; a tiny model and tiny data are made there if it does not exist.
"""

import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText

from lightning_mm import IntermediateOnly, edit, inspect, plan, select_layers, trace
from lightning_mm.causal.study import StudyConfig
from lightning_mm.testing import build_tiny, build_tiny_data


def main(folder: Path) -> None:
    """Every verb once, on one model; none of them changes it."""
    if not folder.exists():
        build_tiny("llava", folder / "model")
        build_tiny_data(folder)
    path, train, probes = str(folder / "model"), folder / "train.json", folder / "probes.json"

    # What a run would cost, before it starts and without weights.
    costs = plan(path, IntermediateOnly("25%-50%"), train, batch_size=4, device="h100")
    for one in costs.estimates:
        print(f"{one.census.policy}: {one.census.trainable / one.census.total:.1%} of the weights")

    # What each layer holds, and which are worth training; a model in memory is left as it was.
    model = AutoModelForImageTextToText.from_pretrained(path)
    found = inspect(model, probes=probes, measures=["overlap", "cka"], select=False)
    print(found.to_pandas().query("measure == 'cka'")[["layer", "site", "value", "low", "high", "null"]])
    print(select_layers(path, train, probes=probes, budget="25%").expression)

    # What causes its answers: without an answer, the model's own first word is followed.
    colours = ["red", "green", "blue", "white"]
    rows = [{"question": f"Name a thing that is {each}.", "constraint": each} for each in colours]
    causes = trace(path, rows, study=StudyConfig(parts=("trace", "ablation"), corruption="symmetric"))
    print(causes)

    # A new answer by a change of one weight, and what else it changed.
    request = {"question": "Name a thing that is red.", "constraint": "red", "new_answer": "small"}
    edited = edit(path, [request], layer=1, control=False, export_to=folder / "edited")
    print(edited.exported)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tiny"))
