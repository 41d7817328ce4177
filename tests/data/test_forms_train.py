"""Every form of data is trained to the loss of its twin in LLaVA's JSON: the same batches reach the model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.loading import Backbone
from lightning_mm.models.processor import load_processor
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import IntermediateOnly
from tests.helpers.chat_templates import QWEN3
from tests.helpers.data import Family
from tests.helpers.data_forms import FORMS

Losses = Callable[[Any, Path, bool], list[float]]


@pytest.fixture(scope="module")
def losses(family: Family) -> Losses:
    """Loss of each step of an epoch, with plain gradient descent, from the same weights."""

    def train(given: Any, folder: Path, has_tools: bool) -> list[float]:
        path = str(family("qwen3_vl" if has_tools else "llava"))
        processing = load_processor(path)
        processing.template = QWEN3 if has_tools else processing.template
        module = MMModule(Backbone(path=path), IntermediateOnly(layers="1-2"))
        module.configure_model()
        optimizer = torch.optim.SGD(module.trainable.values(), lr=0.1)
        options = {"batch_size": 2, "num_workers": 0, "cache_dir": str(folder / "cache"), "max_bad_fraction": 1.0}
        found = []
        for batch in MMDataModule(train=given, processor=processing, **options).train_dataloader():
            assert isinstance(batch, Batch)
            loss = module.objective(batch)
            (loss.nll / loss.num_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.nll.item())
        return found

    return train


@pytest.mark.parametrize("name", FORMS)
def test_a_form_trains_as_its_twin(name: str, losses: Losses, tmp_path: Path) -> None:
    made = FORMS[name](tmp_path)
    (tmp_path / "twin.json").write_text(json.dumps(made.twin))
    has_tools = "tools" in name or "reasoning" in name  # only some templates have a place for them
    twin = losses(str(tmp_path / "twin.json"), tmp_path, has_tools)
    assert twin
    assert losses(made.given, tmp_path, has_tools) == twin
