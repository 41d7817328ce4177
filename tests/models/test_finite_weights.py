"""A base model with weights that are not finite is refused when it is loaded, by tensor and file."""

import math
import re
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_mm.core.errors import UserError
from lightning_mm.models.finite_weights import is_finite
from lightning_mm.models.loading import Backbone, load_model
from tests.helpers.data import Family

BAD = (math.nan, math.inf, -math.inf)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_it_agrees_with_isfinite(dtype: torch.dtype) -> None:
    """Torch's own test of each value is the reference."""
    values = torch.linspace(-3, 3, 101)
    for bad in (0.0, *BAD):
        values[17] = bad
        tensor = values.to(dtype)
        assert is_finite(tensor) == bool(tensor.float().isfinite().all()), bad
    assert is_finite(torch.empty(0, dtype=dtype))
    assert is_finite(torch.ones(3, dtype=torch.uint8))


def damaged(model: Path, folder: Path, value: float) -> tuple[Path, str]:
    """A copy of a model with one value of one tensor replaced, and the tensor's name in its file."""
    copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    key = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight"))
    weights[key][2, 3] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder, key


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_the_tensor_and_its_file_are_named(value: float, family: Family, tmp_path: Path) -> None:
    folder, key = damaged(family("llava"), tmp_path / "damaged", value)
    with pytest.raises(UserError, match=r"weights that are not finite\.") as caught:
        load_model(Backbone(str(folder)))
    kind = "NaN" if math.isnan(value) else "infinite"
    assert re.search(
        rf"1 of its tensors: \S*layers\.1\.mlp\.down_proj\.weight has 1 {kind} of \d+ values", str(caught.value)
    )
    assert f"{key} in model.safetensors" in str(caught.value)


def test_weights_that_overflow_in_the_dtype_asked_for(family: Family, tmp_path: Path) -> None:
    """The largest float32 is beyond the largest bfloat16."""
    folder, _ = damaged(family("llava"), tmp_path / "large", torch.finfo(torch.float32).max)
    load_model(Backbone(str(folder)))
    with pytest.raises(UserError, match="finite in the dtype asked for"):
        load_model(Backbone(str(folder), dtype="bfloat16"))
