"""The site's generated pages, its navigation and links, README's numbers and commands, and the examples."""

import re
import runpy
import shutil
import sys
import types
from pathlib import Path

import pytest
import yaml

from lightning_mm.__main__ import main
from lightning_mm.core.measure_catalog import _KNOWN
from lightning_mm.testing import build_tiny, build_tiny_data

pytestmark = pytest.mark.filterwarnings(
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed:UserWarning",  # Lightning 2.6, without a logger
    "ignore:You defined a `validation_step` but have no `val_dataloader`",  # a fit without validation is an example
    # TRL 1.16 asks transformers 5.23 by an older name.
    "ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:'pin_memory' argument is set as true but no accelerator is found",  # transformers' default, without a GPU
)
ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "scripts"))
    return dict(runpy.run_path(str(ROOT / "scripts/docs_pages/write.py"), run_name="pages")["pages"]())


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    build_tiny("llava", tmp_path / "tiny/model")
    return build_tiny_data(tmp_path / "tiny", rows=8, probes=18)


def test_every_option_that_a_page_names_exists(written: dict[str, str]) -> None:
    known = set(re.findall(r"--[\w.]+", written["reference/options.md"]))
    classes = re.compile(r"--(model\.tuning|trainer\.callbacks)\b")
    own = {"--help", "--print_config", "--fast", "--config", "--json"}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for block in re.findall(r"lightning-mm (?:[^`\n]|\\\n)*", page.read_text(encoding="utf-8")):
            for option in re.findall(r"(?<!\S)--[a-z][\w.]*", block):
                assert option in known | own or classes.match(option), f"{page.name}: {option}"


def test_generated_pages_are_complete(written: dict[str, str]) -> None:
    for measure in _KNOWN:
        assert f"### {measure.name}\n" in written["reference/measures.md"]
    assert "| `IntermediateOnly` |" in written["reference/policies.md"].replace("[", "").replace(
        "](#intermediateonly)", ""
    )
    assert "## GeometryCallback" in written["reference/callbacks.md"]
    assert "No layer matches" in written["reference/errors.md"] or "matches" in written["reference/errors.md"]


def test_every_measure_names_code_that_exists() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import importlib

    from docs_pages.measure_facts import FACTS

    assert FACTS.keys() == {measure.name for measure in _KNOWN}
    for fact in FACTS.values():
        module, _, name = fact.source.rpartition(".")
        assert hasattr(importlib.import_module(f"lightning_mm.{module}"), name), fact.source


def test_navigation_and_links_resolve(written: dict[str, str]) -> None:
    text = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"]))
    assert all(page in written or (ROOT / "docs" / page).is_file() for page in pages)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(pages)
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).exists(), target


def test_a_broken_link_or_anchor_fails_the_build() -> None:
    """Warnings count as errors only where they are not silenced before they are counted."""
    (build,) = re.findall(r"^python -m mkdocs build.*?(?=  #|$)", (ROOT / "scripts/docs.sh").read_text(), re.M)
    assert "--strict" in build
    assert "quiet" not in build
    text = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    checked = yaml.safe_load(text)["validation"]["links"]
    assert set(checked.values()) == {"warn"}
    assert {"not_found", "anchors", "unrecognized_links"} <= set(checked)


def test_readme_is_short_and_its_numbers_are_those_of_the_files() -> None:
    assert len(README.splitlines()) < 120
    made = types.SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/readme_numbers.py"), run_name="numbers"))
    assert not made.stale(), "run python scripts/readme_numbers.py"


def test_readme_commands_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's commands of the sections on your model, as written, on the tiny model and data, for two steps.

    Without W&B and the export's proof in a fresh process, which have tests of their own.
    """
    monkeypatch.setenv("WANDB_MODE", "disabled")
    section = README[README.index("## Your model") : README.index("## Your data")]
    shell, python = (re.search(rf"```{kind}\n(.*?)```", section, re.S) for kind in ("bash", "python"))
    assert shell is not None
    assert python is not None
    for name in ("train.json", "val.json", "probes.json"):
        shutil.copy(tiny / name, tiny.parent / name)
    for picture in tiny.glob("*.png"):
        shutil.copy(picture, tiny.parent / picture.name)
    brief = "--trainer.max_steps 2 --data.num_workers 0 --evaluation.after false"
    extra = {"fit": brief, "export": "--prove false"}
    for line in shell[1].replace("\\\n", " ").splitlines():
        command = line.partition("#")[0].replace("Qwen/Qwen2.5-VL-3B-Instruct", "tiny/model")
        command = command.replace("trainer/gpu.yaml", "trainer/cpu.yaml").strip()
        verb, *options = command.split()[1:]
        assert main([verb, *options, *extra.get(verb, "").split()]) == 0, command
    assert (tiny.parent / "runs/IntermediateOnly/export/config.json").is_file()
    code = python[1].replace("Qwen/Qwen2.5-VL-3B-Instruct", "tiny/model").replace("max_steps=100", "max_steps=2")
    code = code.replace("batch_size=4", "batch_size=4, num_workers=0")
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text(encoding="utf-8")
    if "read_hidden_states" in text or "hf import" in text or 'model="backbone"' in text:
        pytest.importorskip("lightning_mm.callbacks.hf")
    assert len(text.splitlines()) < 60
    monkeypatch.setattr(sys, "argv", [str(path), str(tiny)])
    runpy.run_path(str(path), run_name="__main__")


def test_there_are_six_examples() -> None:
    assert len(EXAMPLES) == 6


def test_the_notebook_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples/notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tiny.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not any(output["output_type"] == "error" for output in outputs)
