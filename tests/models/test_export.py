"""What an export must leave alone, and what it must refuse; ``test_proof`` says whether the folders are right."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from lightning_mm.core.errors import UserError
from lightning_mm.models.export.export import export_adapter, export_full, write_card
from lightning_mm.models.export.model_card import Provenance
from lightning_mm.models.export.verify import take_reference
from lightning_mm.models.layout import Region
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.testing.tiny import build_tiny
from tests.helpers.export_model import DORA, PLAIN, Subject, subject


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llava", tmp_path_factory.mktemp("bases") / "llava")


def test_the_live_model_is_left_as_it_was(llava: Path, tmp_path: Path) -> None:
    s = subject(llava)
    s.adapt(s.middle, DORA)
    s.model.model.language_model.layers[1].train()
    modes = [module.training for module in s.model.modules()]
    before = {name: tensor.clone() for name, tensor in s.model.state_dict().items()}
    pointers = {name: parameter.data_ptr() for name, parameter in s.model.named_parameters()}
    first = take_reference(s.model, s.inputs)
    export_full(s.model, s.processing.processor, tmp_path / "full", s.origin)
    export_adapter(s.model, tmp_path / "adapter", s.origin)
    after = s.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert pointers == {name: parameter.data_ptr() for name, parameter in s.model.named_parameters()}
    assert [module.training for module in s.model.modules()] == modes
    assert torch.equal(take_reference(s.model, s.inputs).logits, first.logits)


def test_a_taken_folder_is_refused_and_left_alone(llava: Path, tmp_path: Path) -> None:
    s = subject(llava)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="is taken"):
        export_full(s.model, s.processing.processor, tmp_path, s.origin)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert export_full(s.model, s.processing.processor, tmp_path / "empty", s.origin).joinpath("config.json").is_file()


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file of this process may grow over 20 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_leaves_nothing_behind(llava: Path, tmp_path: Path) -> None:
    s = subject(llava)
    with pytest.raises(UserError, match="cannot be written"):
        export_full(s.model, s.processing.processor, tmp_path / "out", s.origin)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_finite_is_refused(llava: Path, tmp_path: Path) -> None:
    s = subject(llava)
    s.adapt(s.middle, PLAIN)
    with torch.no_grad():
        s.model.get_submodule(s.middle[3]).lora_B["default"].weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=f"adapter of {s.middle[3]}"):
        export_full(s.model, s.processing.processor, tmp_path / "out", s.origin)
    assert list(tmp_path.iterdir()) == []


def test_what_peft_could_not_restore_is_no_adapter(tmp_path: Path) -> None:
    """Each is refused before anything is written, and told of the format that can."""
    plain = subject(build_tiny("llava_next", tmp_path / "llava_next"))
    tied = subject(build_tiny("gemma3", tmp_path / "gemma3"))
    written = sorted(tmp_path.iterdir())

    def refuses(s: Subject, trained: tuple[str, ...], why: str) -> None:
        with pytest.raises(UserError, match="cannot be written as an adapter") as caught:
            export_adapter(s.model, tmp_path / "out", s.origin, trained)
        assert why in caught.value.why
        assert "'model'" in caught.value.fix

    refuses(plain, (), "no LoRA")
    for s in (plain, tied):
        s.adapt(s.middle, PLAIN)
    refuses(plain, ("model.image_newline",), "model itself holds")
    refuses(tied, tied.layout.parameters_in(Region.EMBEDDING), "head is tied")
    assert sorted(tmp_path.iterdir()) == written


def test_a_quantised_model_is_no_complete_folder(llava: Path, tmp_path: Path) -> None:
    s = subject(llava)
    model = load_model(Backbone(path=str(s.base), quantization="nf4"), keep_full={"lm_head"})
    with pytest.raises(UserError, match="quantised model") as caught:
        export_full(model, s.processing.processor, tmp_path / "out", s.origin)
    assert "lightning-mm export" in caught.value.fix


@pytest.mark.parametrize("base", ['org/model: a "colon"', "org/model"])
def test_the_card_says_where_the_model_comes_from(base: str, tmp_path: Path) -> None:
    write_card(tmp_path, Provenance(base, "abc123", {"Policy": "ConnectorOnly()"}), library="peft")
    _, header, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == base
    assert "license" not in yaml.safe_load(header)
    assert "- **Policy**: ConnectorOnly()" in text
    assert "abc123" in text
