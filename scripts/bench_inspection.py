"""How long one look takes without the forward pass: probes, CKA matrix, neighbors, dimension of all layers at once.

    python scripts/bench_inspection.py [--out benchmarks/inspection.json]

Features are drawn at random with a signal that grows with depth: their shape matters to the time, not their values.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_mm.geometry.cka import cka, cka_matrix
from lightning_mm.geometry.intrinsic_dimension import gride, two_nn
from lightning_mm.geometry.knn_overlap import label_overlap, overlap
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.representations import Representations
from lightning_mm.probes.probe import probe

LAYERS, SAMPLES, FEATURES, LABELS = 31, 1000, 576, 6


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def main() -> None:
    """Time every part once, in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/inspection.json"))
    out = parser.parse_args().out
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (SAMPLES, LABELS), generator=generator)
    depth = torch.linspace(0, 0.3, LABELS * LAYERS).view(LAYERS, 1, LABELS)
    pictures = torch.randn(LAYERS, SAMPLES, FEATURES, generator=generator)
    pictures[..., :LABELS] += depth * labels
    captions = pictures + torch.randn(LAYERS, SAMPLES, FEATURES, generator=generator)
    groups = torch.arange(SAMPLES) // 2
    held: dict[str, object] = {}

    def keep(name: str, value: object) -> None:
        held[name] = value

    a, b = Representations.of(pictures), Representations.of(captions)
    parts: dict[str, Callable[[], object]] = {
        "binary probe": lambda: probe(pictures, labels[:, 0], groups, kind="multinomial"),
        f"multi-label probe, {LABELS} labels": lambda: probe(pictures, labels, groups, kind="multilabel"),
        "Gram matrices and distances": lambda: [each.squared_distances(i) for each in (a, b) for i in range(LAYERS)],
        "neighbours": lambda: (keep("a", Neighbors.of(a)), keep("b", Neighbors.of(b))),
        "overlap of picture and caption": lambda: overlap(held["a"], held["b"], 30),  # type: ignore[arg-type]
        "label overlap": lambda: label_overlap(held["a"], labels[:, 0], 30),  # type: ignore[arg-type]
        "CKA of picture and caption": lambda: cka(a, b),
        "CKA matrix": lambda: cka_matrix(a),
        "TwoNN and GRIDE": lambda: (two_nn(held["a"]), gride(held["a"])),  # type: ignore[arg-type]
    }
    seconds = {}
    for name, part in parts.items():
        began = time.perf_counter()
        part()
        seconds[name] = round(time.perf_counter() - began, 3)
        print(f"{name:36} {seconds[name]:7.2f} s")
    total = round(sum(seconds.values()), 2)
    print(f"{'all':36} {total:7.2f} s")
    shape = {"layers": LAYERS, "samples": SAMPLES, "features": FEATURES}
    machine: dict[str, object] = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    out.parent.mkdir(exist_ok=True)
    result = {
        "shape": shape,
        "machine": machine,
        "torch": torch.__version__,
        "seconds": seconds,
        "total_seconds": total,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
