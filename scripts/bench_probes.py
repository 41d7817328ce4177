"""How much faster all layers are probed at once than by a loop over scikit-learn, at the same protocol and accuracy.

Data flow: made-up hidden states -> both, in turn -> a ratio on the screen and benchmarks/probes.json.

scikit-learn gets the number of BLAS threads that it is fastest with: on two cores, its small products are many times
slower with two threads than with one. Both choose C in each layer on a validation part, refit to training and
validation part and test on a third, with the same parts, grid, tolerances and float32 features. Run it from the
repository: python scripts/bench_probes.py
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import sklearn
import torch
from machine import processor
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from lightning_mm.core.estimate import values
from lightning_mm.probes.cross_validation import stratified_group_folds
from lightning_mm.probes.probe import probe

SEED = 0


def hidden_states(layers: int, samples: int, features: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(L, N, D) with a steep spectrum and large means, classes that middle layers tell best, two samples a group."""
    generator = torch.Generator().manual_seed(SEED)
    labels_N = torch.arange(samples) % classes
    scale_D = torch.arange(1, features + 1) ** -1.0
    direction_KD = torch.randn(classes, features, generator=generator) * scale_D
    x_LND = torch.empty(layers, samples, features)
    for layer, x_ND in enumerate(x_LND):
        turn_DD = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
        signal = 0.25 * (1 - abs(2 * layer / max(layers - 1, 1) - 1))
        noise_ND = torch.randn(samples, features, generator=generator) * scale_D
        x_ND[:] = (noise_ND + signal * direction_KD[labels_N]) @ turn_DD + 5 * torch.randn(
            features, generator=generator
        )
    return x_LND, labels_N, torch.arange(samples) // 2


def loop(x_LND: Tensor, labels_N: Tensor, groups_N: Tensor, c_values: list[float]) -> list[float]:
    """Test accuracy per layer, by scikit-learn."""
    part = stratified_group_folds(labels_N, groups_N, 5, SEED).numpy()
    labels, test, choice = labels_N.numpy(), part == 0, part == 1
    fit = ~(test | choice)
    found = []
    for x in x_LND.numpy():
        scaler = StandardScaler().fit(x[fit])
        scaled, losses = scaler.transform(x), {}
        for c in c_values:
            model = LogisticRegression(C=c, tol=1e-3, max_iter=1000).fit(scaled[fit], labels[fit])
            losses[c] = log_loss(labels[choice], model.predict_proba(scaled[choice]))
        scaled = StandardScaler().fit(x[~test]).transform(x)
        best = min(losses, key=lambda c: losses[c])
        model = LogisticRegression(C=best, tol=1e-4, max_iter=1000).fit(scaled[~test], labels[~test])
        found.append(float(model.score(scaled[test], labels[test])))
    return found


def timed(run: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """Seconds and result."""
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def compare(layers: int, samples: int, features: int, classes: int, rounds: int) -> dict[str, object]:
    """Both in turn, so that a slow spell of the machine hits both."""
    x_LND, labels_N, groups_N = hidden_states(layers, samples, features, classes)
    c_values = [value / features for value in (0.1, 1.0, 10.0, 100.0)]

    def at_once() -> list[float]:
        result = probe(x_LND, labels_N, groups_N, kind="multinomial", c_values=c_values, seed=SEED, cross_fit=False)
        return values(result.estimates)

    def one_by_one(threads: int, num_layers: int = layers) -> list[float]:
        with threadpool_limits(threads):
            return loop(x_LND[:num_layers], labels_N, groups_N, c_values)

    candidates = sorted({1, os.cpu_count() or 1})
    first = {threads: timed(lambda threads=threads: one_by_one(threads, 1))[0] for threads in candidates}
    threads = min(first, key=lambda count: first[count])
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(timed(at_once))
        theirs.append(timed(lambda: one_by_one(threads)))
    seconds, accuracy = statistics.median(s for s, _ in ours), ours[0][1]
    loop_seconds, loop_accuracy = statistics.median(s for s, _ in theirs), theirs[0][1]
    return {
        "shape": {"layers": layers, "samples": samples, "features": features, "classes": classes},
        "ratio": round(loop_seconds / seconds, 2),
        "ratios": [round(b / a, 2) for (a, _), (b, _) in zip(ours, theirs, strict=True)],
        "seconds": round(seconds, 2),
        "scikit_learn_seconds": round(loop_seconds, 2),
        "scikit_learn_threads": threads,
        "scikit_learn_first_layer_by_threads": {count: round(s, 2) for count, s in first.items()},
        "mean_accuracy": round(statistics.mean(accuracy), 4),
        "scikit_learn_mean_accuracy": round(statistics.mean(loop_accuracy), 4),
        "largest_difference": round(max(abs(a - b) for a, b in zip(accuracy, loop_accuracy, strict=True)), 4),
    }


def main() -> None:
    """Compare at the sizes asked for and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("L", "N", "D", "K"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/probes.json"))
    args = parser.parse_args()
    found = []
    for shape in args.shape or [[33, 2500, 1024, 2], [33, 2500, 1024, 5]]:
        found.append(compare(*shape, rounds=args.rounds))
        print(json.dumps(found[-1]))
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "scikit_learn": sklearn.__version__,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "comparisons": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
