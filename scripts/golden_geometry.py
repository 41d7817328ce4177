"""Writes the golden numbers of tests/geometry/golden with other people's libraries:
python scripts/golden_geometry.py, in an environment of its own (they need an old numpy):

    pip install dadapy==0.3.4 scikit-dimension==0.5.0 safetensors

On synthetic clouds, and on the activations of scripts/golden_activations.py. The tests read the clouds from here too.

Shapes: N samples, D features.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent.parent / "tests" / "geometry" / "golden"
Cloud = NDArray[np.float64]


def clouds() -> dict[str, Cloud]:
    """Clouds (N, D) by name; the legacy generator, whose numbers never change."""
    draw = np.random.RandomState(0)
    angle, height = 1.5 * np.pi * (1 + 2 * draw.rand(400)), 21 * draw.rand(400)
    shared = draw.randn(400, 6)
    return {
        "gaussian_5": draw.randn(400, 5),
        "gaussian_20": draw.randn(500, 20),
        "roll": np.stack([angle * np.cos(angle), height, angle * np.sin(angle)], 1) + 0.05 * draw.randn(400, 3),
        "view_1": np.concatenate([shared, 0.5 * draw.randn(400, 10)], 1),
        "view_2": shared @ draw.randn(6, 30) + draw.randn(400, 30),
    }


def labels(cloud: Cloud) -> NDArray[np.int64]:
    """(N,) three classes of unequal size."""
    return np.digitize(cloud[:, 0], np.quantile(cloud[:, 0], [0.3, 0.9]))


def alone(cloud: Cloud) -> dict[str, float]:
    """Dimension and label overlap of one cloud."""
    import skdim
    from dadapy import Data

    data = Data(coordinates=cloud, verbose=False, n_jobs=1)
    data.compute_distances(maxk=64)
    gride, error, _ = data.return_id_scaling_gride(range_max=64)
    classes = labels(cloud)
    return {
        "dadapy_two_nn_base": float(data.compute_id_2NN(algorithm="base")[0]),
        "dadapy_two_nn_ml": float(data.compute_id_2NN(algorithm="ml")[0]),
        "dadapy_gride_16_32": float(gride[4]),
        "dadapy_gride_16_32_error": float(error[4]),
        "dadapy_label_overlap_10": float(data.return_label_overlap(classes, k=10, weighted=False)),
        "dadapy_label_overlap_10_weighted": float(data.return_label_overlap(classes, k=10, weighted=True)),
        "skdim_two_nn": float(skdim.id.TwoNN(discard_fraction=0.1).fit(cloud).dimension_),
    }


def together(first: Cloud, second: Cloud) -> dict[str, float]:
    """Overlap and imbalance of two clouds of the same samples."""
    from dadapy import Data

    data = Data(coordinates=first, verbose=False, n_jobs=1)
    numbers = {}
    for k in (10, 30):
        numbers[f"dadapy_overlap_{k}"] = float(data.return_data_overlap(second, k=k))
        numbers[f"mutual_knn_{k}"] = mutual_knn(first, second, k)
    for k in (1, 5):
        there, back = data.return_information_imbalace(second, k=k, subset_size=len(first))
        numbers[f"dadapy_imbalance_there_{k}"], numbers[f"dadapy_imbalance_back_{k}"] = float(there[0]), float(back[0])
    return numbers


def mutual_knn(first: Cloud, second: Cloud, k: int) -> float:
    """As Huh et al. (2024) describe it: nearest by inner product of unit rows, mean share of common ones."""
    near = []
    for cloud in (first, second):
        unit = cloud / np.linalg.norm(cloud, axis=1, keepdims=True)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -np.inf)
        near.append(np.argsort(-similarity, axis=1, kind="stable")[:, :k])
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(*near, strict=True)]))


def write(name: str, numbers: dict[str, Any]) -> None:
    """One JSON file, with what made it."""
    made_by = {package: version(package) for package in ("dadapy", "scikit-dimension", "numpy")}
    (FOLDER / f"{name}.json").write_text(json.dumps({"made_by": made_by, **numbers}, indent=1) + "\n")


def main() -> None:
    """Both files."""
    from safetensors.numpy import load_file

    synthetic = clouds()
    write(
        "synthetic",
        {
            "alone": {name: alone(cloud) for name, cloud in synthetic.items()},
            "together": {"view_1~view_2": together(synthetic["view_1"], synthetic["view_2"])},
        },
    )
    file = load_file(FOLDER / "activations.safetensors")
    read = {name: file[name].astype(np.float64) for name in ("picture", "caption")}
    write(
        "activations",
        {
            "alone": {name: [alone(layer) for layer in layers] for name, layers in read.items()},
            "together": {"picture~caption": [together(*pair) for pair in zip(*read.values(), strict=True)]},
        },
    )


if __name__ == "__main__":
    main()
