"""The public names of the package: each exists, is documented, and costs nothing before it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_mm

HEAVY = ("torch", "transformers", "lightning", "peft", "wandb", "altair", "numpy", "rich")


@pytest.mark.parametrize("name", lightning_mm.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(lightning_mm, name)
    assert value.__name__ == name
    assert (value.__doc__ or "").strip()
    assert not (value.__doc__ or "").startswith(f"{name}("), "a dataclass without a docstring of its own"
    assert name in dir(lightning_mm)


def test_python_and_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(lightning_mm.__file__).read_text(encoding="utf-8"))
    guarded = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in ast.walk(guarded[0])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == lightning_mm._HOME
    assert sorted(seen) == lightning_mm.__all__ == sorted(lightning_mm.__all__, key=str)


def test_the_import_alone_loads_nothing_heavy() -> None:
    """Fresh processes: here, everything is imported already."""
    code = (
        "import sys, time; began = time.process_time(); import lightning_mm; took = time.process_time() - began;"
        f"print(took < 0.1, [name for name in {HEAVY} if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split(" ", 1) == ["True", "[]\n"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'IntermediateOnyl'"):
        _ = lightning_mm.IntermediateOnyl  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from lightning_mm import IntermediateOnyl")
