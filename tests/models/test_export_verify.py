"""Exports hold what they promise in a fresh process, with transformers and PEFT alone: they are the outside reference.

One process examines all folders, for it takes seconds to start.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_mm.core.errors import UserError
from lightning_mm.models.export.export import export_adapter, export_full
from lightning_mm.models.export.verify import (
    ExportCheck,
    ExportCheckResult,
    compare_exports,
    take_reference,
    verify_export,
)
from lightning_mm.models.processor import load_processor
from lightning_mm.testing.tiny import build_tiny
from tests.helpers.export_model import DORA, PLAIN, Subject, subject

FAMILIES = ("llava", "qwen2_5_vl", "smolvlm", "internvl", "gemma3")
"""Between them: heads tied and untied, connectors with a bare parameter (gemma3) and inside the tower (qwen2_5_vl)."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    made = {family: build_tiny(family, root / family) for family in FAMILIES}
    for base in made.values():  # a setting that no config implies, which the export must carry over
        file = base / "generation_config.json"
        settings = json.loads(file.read_text()) | {"repetition_penalty": 1.25}
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return made


class Workshop:
    """Makes exports of one family and keeps what is claimed of them."""

    def __init__(self, base: Path, out: Path) -> None:
        self.base, self.out = base, out
        self.claims: dict[str, ExportCheck] = {}
        self.untrained = take_reference((s := subject(base)).model, s.inputs)

    def full(self, name: str, s: Subject) -> None:
        folder = export_full(s.model, s.processing.processor, self.out / name, s.origin)
        self.claims[name] = ExportCheck(folder, take_reference(s.model, s.inputs))

    def adapter(self, name: str, s: Subject, trained: tuple[str, ...] = ()) -> None:
        folder = export_adapter(s.model, self.out / name, s.origin, trained)
        self.claims[name] = ExportCheck(folder, take_reference(s.model, s.inputs), str(s.base))

    def make(self) -> None:
        changed = subject(self.base)
        changed.shake(lambda name: True)
        self.full("full", changed)
        adapted = subject(self.base)
        adapted.adapt(adapted.middle, PLAIN)
        self.adapter("adapter", adapted)
        self.full("merged", adapted)
        joined = subject(self.base)
        joined.adapt(joined.middle, DORA)
        joined.shake(joined.connector)
        self.adapter("dora+connector", joined, joined.connector)
        self.full("dora+connector merged", joined)


KINDS = ("full", "adapter", "merged", "dora+connector", "dora+connector merged")


@pytest.fixture(scope="module")
def workshops(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workshop]:
    made = {family: Workshop(base, tmp_path_factory.mktemp(family)) for family, base in bases.items()}
    for workshop in made.values():
        workshop.make()
    add_tied_head(made["gemma3"])
    add_faults(made["llava"])
    return made


def add_tied_head(workshop: Workshop) -> None:
    """An adapter on a head that is the embedding; no policy of ours gives one, but merging it must not ruin both."""
    s = subject(workshop.base)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        s.adapt(["lm_head", *s.middle], PLAIN)
    workshop.full("tied head merged", s)


def add_faults(workshop: Workshop) -> None:
    """Spoiled twins of good folders."""

    def spoil(kind: str, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        good = workshop.claims[kind]
        folder = shutil.copytree(good.folder, workshop.out / name)
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        workshop.claims[name] = replace(good, folder=folder)

    def first(tensors: dict[str, torch.Tensor], part: str) -> str:
        return next(name for name in sorted(tensors) if part in name)

    spoil("full", "one value wrong", lambda t: t[first(t, "layers.2.mlp.down_proj")][0, 0].add_(10.0))
    spoil("full", "nan", lambda t: t[first(t, "layers.2.mlp.down_proj")][0, 0].fill_(float("nan")))
    spoil("full", "one tensor missing", lambda t: t.pop(first(t, "layers.2.mlp.down_proj")))
    spoil("full", "one tensor too many", lambda t: t.update({"model.stray.weight": torch.zeros(2)}))
    spoil("adapter", "lora_B lost", lambda t: t[first(t, "lora_B")].zero_())
    spoil("adapter", "lora_A missing", lambda t: t.pop(first(t, "lora_A")))
    spoil("adapter", "stray lora_A", lambda t: t.update({"base_model.model.stray.lora_A.weight": torch.zeros(2)}))


@pytest.fixture(scope="module")
def verdicts(workshops: dict[str, Workshop]) -> dict[tuple[str, str], ExportCheckResult]:
    claims = {(family, kind): claim for family, w in workshops.items() for kind, claim in w.claims.items()}
    return dict(zip(claims, compare_exports(list(claims.values())), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_process_comes_to_the_live_logits(
    family: str, kind: str, workshops: dict[str, Workshop], verdicts: dict[tuple[str, str], ExportCheckResult]
) -> None:
    verdict, claim = verdicts[family, kind], workshops[family].claims[kind]
    assert verdict.complaints == ()
    # The same kernels on the same tensors give the same bits; merging rounds each weight once more (see TOLERANCE).
    exact = "full" in kind or claim.base is not None
    assert verdict.difference <= (0.0 if exact else 1e-5 * verdict.scale)
    # What was trained shows in the logits by far more than that, so the comparison means something.
    moved = (claim.reference.logits - workshops[family].untrained.logits).abs().max().item()
    assert moved > 0.1 * verdict.scale


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("one value wrong", None),
        ("nan", None),
        ("one tensor missing", "missing"),
        ("one tensor too many", "unexpected"),
        ("lora_B lost", None),
        ("lora_A missing", "missing"),
        ("stray lora_A", "unexpected"),
    ],
)
def test_a_spoiled_folder_does_not_pass(
    fault: str, complaint: str | None, verdicts: dict[tuple[str, str], ExportCheckResult]
) -> None:
    verdict = verdicts["llava", fault]
    assert not verdict.passed
    assert [text.split()[0] for text in verdict.complaints] == ([complaint] if complaint else [])


def test_prove_says_what_is_wrong(workshops: dict[str, Workshop]) -> None:
    with pytest.raises(UserError, match="does not restore the trained model") as caught:
        verify_export(workshops["llava"].claims["one value wrong"])
    assert "differ by" in caught.value.why


def test_a_folder_that_cannot_be_loaded_is_named(workshops: dict[str, Workshop], tmp_path: Path) -> None:
    good = workshops["llava"].claims["full"]
    folder = shutil.copytree(good.folder, tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cut cannot be loaded by a fresh process"):
        compare_exports([good, replace(good, folder=folder)])


def test_a_tied_head_stays_tied_unless_an_adapter_parts_it(
    workshops: dict[str, Workshop], verdicts: dict[tuple[str, str], ExportCheckResult]
) -> None:
    out = workshops["gemma3"].out
    for kind, tied in (("full", True), ("merged", True), ("tied head merged", False)):
        config = json.loads((out / kind / "config.json").read_text())
        assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in load_file(out / kind / "model.safetensors")) is not tied
    assert verdicts["gemma3", "tied head merged"].passed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_folder_is_a_plain_one(family: str, workshops: dict[str, Workshop]) -> None:
    base, merged = workshops[family].base, workshops[family].out / "merged"
    names = {path.name for path in merged.iterdir()}
    assert names == {path.name for path in base.iterdir()} | {"README.md"}
    assert load_file(merged / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    assert len({path.stat().st_mode for path in merged.iterdir()}) == 1
    for file in ("generation_config.json", "chat_template.jinja"):
        assert (merged / file).read_text() == (base / file).read_text()
    before, after = load_processor(str(base)), load_processor(str(merged))
    text = before.render([{"role": "user", "content": "Hello"}])
    assert after.render([{"role": "user", "content": "Hello"}]) == text
    first, again = (p.encode([text], [[]], "right").inputs["input_ids"] for p in (before, after))
    assert torch.equal(again, first)


def test_the_adapter_names_its_base_and_what_trained_beside_it(workshops: dict[str, Workshop]) -> None:
    workshop = workshops["gemma3"]
    config = json.loads((workshop.out / "dora+connector" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(workshop.base)
    # Its bare projection matrix is saved by way of the module that owns it.
    assert config["modules_to_save"] == ["model.multi_modal_projector"]
    assert config["inference_mode"] is True


def test_padding_does_not_count(bases: dict[str, Path]) -> None:
    s = subject(bases["llava"])
    padded = dict(s.inputs)
    for name, value in (("input_ids", s.processing.processor.tokenizer.pad_token_id), ("attention_mask", 0)):
        padded[name] = torch.nn.functional.pad(s.inputs[name], (0, 5), value=value)
    # A few units in the last place: attention sums over a longer, masked row.
    torch.testing.assert_close(
        take_reference(s.model, padded).logits, take_reference(s.model, s.inputs).logits, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("difference", [float("nan"), float("inf"), 1.1e-5])
def test_a_verdict_fails_closed(difference: float) -> None:
    good = ExportCheckResult(1e-5, 1.0, 1e-5, ())
    assert good.passed
    assert not replace(good, difference=difference).passed
    assert not replace(good, complaints=("missing lm_head.weight",)).passed
