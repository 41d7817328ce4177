"""The model card says what was trained and measured, and its snippet runs."""

import re
import warnings
from pathlib import Path

import pytest
import yaml

from lightning_mm.models.export.export import export_adapter, export_full
from lightning_mm.models.export.model_card import Provenance, write_card
from tests.helpers.data import Family
from tests.helpers.export_model import PLAIN, subject

ROWS = [
    {"type": "colour", "n": 40, "majority": 0.25, "before": 0.1, "after": 0.9, "no_image": None},
    {"type": "all", "n": 100, "majority": 0.2, "before": 0.1, "after": 0.8, "no_image": 0.3},
]


def card(folder: Path) -> tuple[dict[str, object], str]:
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def test_it_holds_origin_settings_and_results_with_intervals(tmp_path: Path) -> None:
    origin = Provenance(
        "org/base",
        "abc123",
        {"Policy": "IntermediateOnly(25%-50%)", "Step": "200"},
        hyperparameters={"model.optimizer.lr": 2e-4, "data.train": "/home/me/secret/train.json", "odd": "a|b"},
        accuracy=ROWS,
        data="test.json",
        license="apache-2.0",
        repo="me/mine",
    )
    write_card(tmp_path, origin, library="transformers")
    header, text = card(tmp_path)
    assert header["base_model"] == "org/base"
    assert (header["library_name"], header["pipeline_tag"]) == ("transformers", "image-text-to-text")
    assert (header["license"], header["tags"]) == ("apache-2.0", ["lightning_mm"])
    (result,) = header["model-index"][0]["results"]  # type: ignore[index]
    assert (result["dataset"]["name"], result["metrics"][0]["value"]) == ("test.json", 0.8)
    # The interval of 80 in 100 by Wilson's formula, as statsmodels and Wikipedia give it: 0.711 to 0.867.
    assert "| all | 100 | 10.0% (5.5% to 17.4%) | 80.0% (71.1% to 86.7%) |" in text
    assert "| colour | 40 |" in text
    assert "not measured" in text
    assert "| model.optimizer.lr | 0.0002 |" in text
    assert "| odd | a\\|b |" in text
    assert "- **Step**: 200" in text
    assert "# me/mine" in text
    assert "- torch " in text
    assert "train.json" in text
    assert "secret" not in text  # it may be uploaded


def test_a_local_base_is_no_hub_model(tmp_path: Path) -> None:
    write_card(tmp_path, Provenance(str(tmp_path / "base")), library="peft")
    header, text = card(tmp_path)
    assert "base_model" not in header
    assert "license" not in header
    assert "model-index" not in header
    assert "- **Base model**: base\n" in text


@pytest.mark.parametrize("form", ["model", "adapter"])
def test_its_snippet_runs(
    form: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    s = subject(family("llava"))
    s.adapt(s.middle, PLAIN)
    if form == "model":
        out = export_full(s.model, s.processing.processor, tmp_path / "out", s.origin)
    else:
        out = export_adapter(s.model, tmp_path / "out", s.origin, processor=s.processing.processor)
    (snippet,) = re.findall(r"```python\n(.*?)```", card(out)[1], re.DOTALL)
    monkeypatch.chdir(out)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's, about names that transformers is going to drop
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["answer"].shape[1] > 0  # type: ignore[attr-defined]
    assert capsys.readouterr().out.strip()
