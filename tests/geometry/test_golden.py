"""The same numbers as DADApy, scikit-dimension and mutual kNN, on synthetic clouds and on the nano model's activations.

The golden files come from scripts/golden_geometry.py, run in an environment of its own.
"""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_mm.geometry.information_imbalance import information_imbalance
from lightning_mm.geometry.intrinsic_dimension import Gride, gride, log_ratios, two_nn
from lightning_mm.geometry.knn_overlap import label_overlap, overlap
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.representations import Representations

GOLDEN = Path(__file__).parent / "golden"
SCRIPT: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "golden_geometry.py"))


def _cases() -> tuple[dict[str, tuple[Tensor, dict[str, float]]], dict[str, tuple[Tensor, Tensor, dict[str, float]]]]:
    """Features (1, N, D) in float64 with the golden numbers, of one cloud and of two."""
    clouds = {name: torch.tensor(cloud)[None] for name, cloud in SCRIPT["clouds"]().items()}
    synthetic, real = (json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("synthetic", "activations"))
    alone = {name: (clouds[name], numbers) for name, numbers in synthetic["alone"].items()}
    together = {
        pair: (*(clouds[name] for name in pair.split("~")), numbers) for pair, numbers in synthetic["together"].items()
    }
    read = {name: layers.double() for name, layers in load_file(GOLDEN / "activations.safetensors").items()}
    for name, numbers in real["alone"].items():
        alone |= {f"{name}-{layer}": (read[name][layer, None], of) for layer, of in enumerate(numbers)}
    for pair, numbers in real["together"].items():
        first, second = (read[name] for name in pair.split("~"))
        together |= {f"{pair}-{i}": (first[i, None], second[i, None], of) for i, of in enumerate(numbers)}
    return alone, together


ALONE, TOGETHER = _cases()
PRECISION = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@PRECISION
@pytest.mark.parametrize("name", ALONE)
def test_dimensions(name: str, dtype: torch.dtype) -> None:
    """DADApy solves the likelihood equation to 1e-7 and fits by least squares to 1e-8; float32 distances add 1e-5."""
    features, golden = ALONE[name]
    near = Neighbors.of(Representations.of(features.to(dtype)))
    measured = {
        "dadapy_two_nn_base": two_nn(near, "fit")[0].value,
        "skdim_two_nn": two_nn(near, "fit")[0].value,
        "dadapy_two_nn_ml": two_nn(near, "ml")[0].value,
        "dadapy_gride_16_32": gride(near)[0].value,
    }
    tolerance = 1e-7 if dtype == torch.float64 else 1e-5
    assert measured == pytest.approx({key: golden[key] for key in measured}, rel=tolerance)
    ratios = log_ratios(near, 16, 32)
    assert float(Gride().fisher_error(ratios, Gride()(ratios))) == pytest.approx(
        golden["dadapy_gride_16_32_error"], rel=tolerance
    )


@PRECISION
@pytest.mark.parametrize("name", ALONE)
def test_label_overlap(name: str, dtype: torch.dtype) -> None:
    """Counts: nothing but the last digit of a mean may differ."""
    features, golden = ALONE[name]
    near, labels = (
        Neighbors.of(Representations.of(features.to(dtype))),
        torch.tensor(SCRIPT["labels"](features[0].numpy())),
    )
    plain, balanced = (label_overlap(near, labels, 10, balanced=each)[0].value for each in (False, True))
    assert plain == pytest.approx(golden["dadapy_label_overlap_10"], abs=1e-12)
    assert balanced == pytest.approx(golden["dadapy_label_overlap_10_weighted"], abs=1e-12)


@PRECISION
@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("k", [10, 30])
def test_overlap(name: str, k: int, dtype: torch.dtype) -> None:
    """Counts: nothing but the last digit of a mean may differ, and mutual kNN is the overlap of unit rows."""
    first, second, golden = TOGETHER[name]
    near = [Neighbors.of(Representations.of(features.to(dtype))) for features in (first, second)]
    assert overlap(*near, k)[0].value == pytest.approx(golden[f"dadapy_overlap_{k}"], abs=1e-12)
    unit = [torch.nn.functional.normalize(features, dim=2) for features in (first, second)]
    near = [Neighbors.of(Representations.of(features.to(dtype))) for features in unit]
    assert overlap(*near, k)[0].value == pytest.approx(golden[f"mutual_knn_{k}"], abs=1e-12)


@PRECISION
@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("k", [1, 5])
def test_imbalance(name: str, k: int, dtype: torch.dtype) -> None:
    """Ranks: exact in float64; in float32 a few of the N^2 comparisons of nearly equal distances may fall otherwise."""
    first, second, golden = TOGETHER[name]
    a, b = Representations.of(first.to(dtype)), Representations.of(second.to(dtype))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert information_imbalance(a, b, k)[0].value == pytest.approx(
        golden[f"dadapy_imbalance_there_{k}"], abs=tolerance
    )
    assert information_imbalance(b, a, k)[0].value == pytest.approx(golden[f"dadapy_imbalance_back_{k}"], abs=tolerance)
