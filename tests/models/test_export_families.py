"""Exports of every family load with AutoProcessor and answer a chat with a picture, in one fresh process.

Where torchvision is installed, all of them do; elsewhere transformers loads no video processor, and the families that
have one are loaded without it, as their base models are.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils.import_utils import is_torchvision_available

from lightning_mm.core.decisions import decision_log
from lightning_mm.core.errors import UserError
from lightning_mm.models.export.base_files import missing_parts
from lightning_mm.models.export.export import export_adapter, export_full
from lightning_mm.models.export.model_card import Provenance
from lightning_mm.models.export.verify import (
    ExportCheck,
    ExportCheckResult,
    compare_exports,
    take_chat,
    take_reference,
)
from lightning_mm.testing.tiny import FAMILIES
from lightning_mm.testing.tiny_processors import VIDEO_PROCESSORS
from tests.helpers.data import Family
from tests.helpers.export_model import PLAIN, Subject, subject

LEGACY = ("chat_template.jinja", "processor_config.json")
"""Files that a base of an earlier transformers does not have; it has older ones instead."""


def check(s: Subject, folder: Path, base: Path | None = None) -> ExportCheck:
    chat = take_chat(s.model, s.processing)
    return ExportCheck(folder, take_reference(s.model, s.inputs), None if base is None else str(base), chat=chat)


def half_size(base: Path, folder: Path) -> Path:
    """A copy of a tiny model whose weights are in bfloat16, as those of most models are."""
    s = subject(base)
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    s.model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def spoiled(good: ExportCheck, folder: Path, change: Callable[[Path], object]) -> ExportCheck:
    shutil.copytree(good.folder, folder)
    change(folder)
    return replace(good, folder=folder)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def checks(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportCheck]:
    """One check per family, then those of a base in bfloat16, an adapter, and folders that were spoiled."""
    root, made = tmp_path_factory.mktemp("exports"), {}
    for name in FAMILIES:
        s = subject(family(name))
        s.shake(lambda name: "layers.1." in name)
        made[name] = check(s, export_full(s.model, s.processing.processor, root / name, s.origin))
    s = subject(half_size(family("qwen2_5_vl"), root / "half"))
    s.shake(lambda name: "layers.1." in name)
    made["bfloat16"] = check(s, export_full(s.model, s.processing.processor, root / "bfloat16", s.origin))
    made["float32"] = check(s, export_full(s.model, s.processing.processor, root / "float32", s.origin, "float32"))
    s = subject(family("llava"))
    s.adapt(s.middle, PLAIN)
    out = export_adapter(s.model, root / "adapter", s.origin, processor=s.processing.processor)
    made["adapter"] = check(s, out, s.base)
    made["bare adapter"] = replace(made["adapter"], folder=export_adapter(s.model, root / "bare", s.origin))
    good = made["gemma3"]
    made["other template"] = spoiled(good, root / "t", _shout)
    made["other pixels"] = spoiled(
        good, root / "p", lambda f: edit_json(f / "processor_config.json", lambda c: _darken(c["image_processor"]))
    )
    made["no video processor"] = spoiled(made["qwen2_5_vl"], root / "v", _drop_video)
    made["other answer"] = replace(good, chat=replace(good.chat, answer=good.chat.answer.roll(1)))  # type: ignore[type-var]
    return made


def _shout(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "!")


def _drop_video(folder: Path) -> None:
    edit_json(folder / "processor_config.json", lambda config: config.pop("video_processor"))


def _darken(config: dict[str, Any]) -> None:
    config["image_mean"] = [0.1, 0.1, 0.1]


@pytest.fixture(scope="module")
def results(checks: dict[str, ExportCheck]) -> dict[str, ExportCheckResult]:
    return dict(zip(checks, compare_exports(list(checks.values())), strict=True))


@pytest.mark.parametrize("name", [*FAMILIES, "bfloat16", "float32", "adapter", "bare adapter"])
def test_a_fresh_process_loads_processor_and_model_and_answers(
    name: str, results: dict[str, ExportCheckResult], checks: dict[str, ExportCheck]
) -> None:
    result = results[name]
    assert result.complaints == ()
    assert result.passed
    assert result.num_tokens > 0
    if name not in ("bfloat16", "float32"):  # the same kernels on the same weights; an answer is a row of near ties
        assert result.num_same == result.num_tokens
    has_video = name in VIDEO_PROCESSORS or name in ("bfloat16", "float32")
    assert result.loaded_by == ("parts" if has_video and not is_torchvision_available() else "AutoProcessor")


def test_eight_families_need_no_torchvision(results: dict[str, ExportCheckResult]) -> None:
    assert sum(results[name].loaded_by == "AutoProcessor" for name in FAMILIES) >= 8


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("other template", "another text"),
        ("other pixels", "another pixel_values"),
        ("other answer", "answer differs"),
        ("no video processor", "processor cannot be loaded: Can't load video processor"),
    ],
)
def test_a_spoiled_processor_does_not_pass(name: str, complaint: str, results: dict[str, ExportCheckResult]) -> None:
    assert not results[name].passed
    assert any(complaint in each for each in results[name].complaints)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_has_every_small_file_of_its_base(name: str, checks: dict[str, ExportCheck], family: Family) -> None:
    base, out = family(name), Path(checks[name].folder)
    for path in base.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert missing_parts(subject(base).processing.processor, out) == ()


def test_a_bfloat16_base_stays_that_size(checks: dict[str, ExportCheck], results: dict[str, ExportCheckResult]) -> None:
    out, wide = (Path(checks[name].folder) for name in ("bfloat16", "float32"))
    base = out.parent / "half"
    assert (out / "model.safetensors").stat().st_size < 1.05 * (base / "model.safetensors").stat().st_size
    config = json.loads((out / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {"bfloat16"}
    before, after, full = (load_file(folder / "model.safetensors") for folder in (base, out, wide))
    assert before.keys() == after.keys() == full.keys()
    for name, tensor in after.items():  # frozen: the very bits; trained: the nearest values
        assert torch.equal(tensor, full[name].to(torch.bfloat16))
        assert torch.equal(tensor, before[name]) is ("layers.1." not in name)
    assert {t.dtype for t in full.values()} == {torch.float32}
    # Rounding is all that differs, and it is less than what the tolerance allows.
    assert 0 < results["bfloat16"].difference < results["bfloat16"].tolerance * results["bfloat16"].scale
    assert results["float32"].difference == 0


def test_code_and_pickles_stay_behind(family: Family, tmp_path: Path) -> None:
    """A folder as an earlier transformers left it, with code and licence beside it."""
    base = shutil.copytree(family("qwen2_vl"), tmp_path / "base")
    for name in ("modeling_x.py", "pytorch_model.bin", "optimizer.pt", "trainer_state.json", ".hidden.json"):
        (base / name).write_text("{}")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    for name in ("LICENSE", "vocab.json", "merges.txt", "preprocessor_config.json"):
        (base / name).write_text("{}")
    s = subject(base)
    out = export_full(s.model, s.processing.processor, tmp_path / "out", s.origin)
    assert {path.name for path in out.iterdir()} == {
        *("LICENSE", "vocab.json", "merges.txt", "preprocessor_config.json", "README.md", "model.safetensors"),
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", *LEGACY),
    }
    assert "license: apache-2.0" in (out / "README.md").read_text()
    assert any(d.name == "export.code" and d.value.startswith("3 ") for d in decision_log())


def test_a_changed_processor_is_written_with_the_parts_it_lacks(family: Family, tmp_path: Path) -> None:
    s = subject(family("qwen2_5_vl"))
    s.processing.processor.image_processor.size = {"shortest_edge": 196, "longest_edge": 784}
    out = export_full(s.model, s.processing.processor, tmp_path / "out", s.origin)
    written = json.loads((out / "processor_config.json").read_text())
    assert written["image_processor"]["size"] == {"shortest_edge": 196, "longest_edge": 784}
    assert written["video_processor"]["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert any("processor_config.json was changed" in d.reason for d in decision_log())


def test_a_lost_base_is_said(family: Family, tmp_path: Path) -> None:
    s = subject(family("llava"))
    out = export_full(s.model, s.processing.processor, tmp_path / "out", Provenance(str(tmp_path / "gone")))
    assert (out / "tokenizer.json").is_file()
    said = {d.name: d.reason for d in decision_log()}
    assert "not at hand" in said["export.processor"]
    assert "cannot be found" in said["export.dtype"]


def test_a_generation_config_that_transformers_would_not_write_is_kept(family: Family, tmp_path: Path) -> None:
    """Published ones are often invalid: sampling settings without sampling."""
    base = shutil.copytree(family("llava"), tmp_path / "base")
    edit_json(base / "generation_config.json", lambda c: c.update(do_sample=False, temperature=0.2))
    s = subject(base)
    out = export_full(s.model, s.processing.processor, tmp_path / "out", s.origin)
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()


def test_what_a_dtype_cannot_hold_is_refused(family: Family, tmp_path: Path) -> None:
    s = subject(family("llava"))
    with torch.no_grad():
        s.model.lm_head.weight[0, 0] = 1e6
    with pytest.raises(UserError, match=r"lm_head.weight cannot be written in float16"):
        export_full(s.model, s.processing.processor, tmp_path / "out", s.origin, "float16")
    assert not (tmp_path / "out").exists()
