"""A model folder from elsewhere is refused in one line within seconds, or loads; it runs nothing."""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_mm.core.errors import UserError
from lightning_mm.data.chat import ChatRenderer
from lightning_mm.models import template_limits
from lightning_mm.models.folder_checks import check_config
from lightning_mm.models.loading import Backbone, load_model, load_skeleton
from lightning_mm.models.processor import ModelProcessor, load_processor
from lightning_mm.testing.tiny import FAMILIES
from tests.helpers.data import Family
from tests.helpers.hostile_inputs import cases
from tests.helpers.hostile_models import TEMPLATES, HostileModel, hostile_models, spoil

SECONDS = 20.0
"""Processor time for one folder; a good one takes about half a second, and other work shares the machine."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates have less time: a loop without end is as long at any limit."""
    monkeypatch.setattr(template_limits, "SECONDS", 0.2)


def load(folder: Path) -> None:
    """All that is read of a folder before a run."""
    load_skeleton(Backbone(str(folder)))
    load_model(Backbone(str(folder)))
    ChatRenderer(load_processor(str(folder)))


def learn(processing: ModelProcessor) -> None:
    """What is done with a chat template before a run."""
    template_limits.refuse_unlimited(processing.template)
    ChatRenderer(processing)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("change", list(hostile_models(*cases(26))), ids=lambda each: each.label.partition(" ")[0])
def test_a_hostile_folder(
    change: HostileModel, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(family("llava"), folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(folder)
    spoil(folder, change)
    began = time.process_time()
    try:
        load(folder)
        refused = None
    except UserError as error:
        refused = str(error)
    assert time.process_time() - began < SECONDS, change.label
    assert refused is not None or not change.refused, change.label
    assert refused is None or (refused.count("\n") == 2 and len(refused) < 2000), change.label
    assert not (tmp_path / "fired").exists(), change.label
    assert "hostile_code" not in sys.modules, change.label


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda text: text[:24])
def test_a_hostile_template(template: str, processing: Callable[[str], ModelProcessor]) -> None:
    made = processing("llava")
    made.template = template
    began = time.process_time()
    with pytest.raises((UserError, template_limits.TemplateLimitError)) as refused:
        learn(made)
    assert time.process_time() - began < SECONDS
    assert len(str(refused.value)) < 2000


def test_limits_are_taken_off_again() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS), template_limits.signal.getsignal(template_limits.signal.SIGVTALRM)
    with pytest.raises(KeyError), template_limits.limited(memory=True):
        raise KeyError
    after = resource.getrlimit(resource.RLIMIT_AS), template_limits.signal.getsignal(template_limits.signal.SIGVTALRM)
    assert after == before
    assert template_limits.signal.getitimer(template_limits.signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"text_config": {"attn_implementation": "org/name"}}, "text_config.attn_implementation is 'org/name'"),
        ({"vocab_size": 2**23, "hidden_size": 2**20}, "is of a model with"),
        ({"text_config": {"num_hidden_layers": 10**6}}, "no model has more than 1,000"),
    ],
)
def test_what_a_refusal_says(entry: dict[str, object], said: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(UserError, match=said):
        check_config(str(tmp_path), entry)


def test_a_folder_without_weights_can_be_planned(tmp_path: Path) -> None:
    """Its config alone says how large the model is: 1.6 billion embeddings."""
    check_config(str(tmp_path), {"vocab_size": 2**18, "hidden_size": 6144})


def test_no_family_is_refused() -> None:
    """The bounds are far above what models are: those of real configs of some size pass."""
    large = {"hidden_size": 18432, "intermediate_size": 73728, "num_hidden_layers": 126, "vocab_size": 262_400}
    experts = {"hidden_size": 7168, "n_routed_experts": 384, "moe_intermediate_size": 2048, "num_hidden_layers": 61}
    check_config("org/large", {"text_config": large, "vision_config": {"image_size": 448, "patch_size": 14}})
    check_config("org/experts", {"text_config": experts, "rope_theta": 5_000_000, "image_token_id": 151_655})
    assert FAMILIES  # every one of them is loaded by tests/testing/test_tiny.py
