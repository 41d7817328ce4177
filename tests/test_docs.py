"""What the documents name exists: files, modules, rooms in the order of the import contracts, and slow tests.

CHANGELOG.md is left out: it names what was moved away.
"""

import ast
import importlib
import re
import tomllib
from functools import reduce
from pathlib import Path

import pytest

from tests.helpers.slow import SLOW_TESTS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "SECURITY.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
PATH = re.compile(r"(?<![\w/.-])(?:lightning_mm|tests|scripts|configs|docker|docs)/[\w./-]*\w/?")
MODULE = re.compile(r"(?<![\w/.-])lightning_mm(?:\.\w+)+")

document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@document
def test_named_paths_exist(document: Path) -> None:
    named = set(PATH.findall(document.read_text(encoding="utf-8")))
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


@document
def test_named_modules_import(document: Path) -> None:
    for name in sorted(set(MODULE.findall(document.read_text(encoding="utf-8")))):
        _found(name)


def _found(name: str) -> object:
    """The module, or the attribute of a module, that a dotted name stands for."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            module: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[length:], module)
    raise ModuleNotFoundError(name)


def test_rooms_are_those_of_the_import_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["type"] == "layers")
    rooms = [layer for layer in layers if layer != "__main__"]
    folders = {path.parent.name for path in (ROOT / "lightning_mm").glob("*/__init__.py")}
    assert folders == set(rooms)
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    chain = re.search(r"^ {4}cli -> .*(?:\n {4,}->.*)*", contributing, re.M)
    assert chain is not None
    assert re.findall(r"\w+", chain[0]) == rooms
    assert re.findall(r"^\| `(\w+)`", contributing, re.M) == rooms
    layout = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    assert re.findall(r"`(\w+)/`", layout[layout.index("| room |") : layout.index("Start with")]) == rooms


def test_slow_tests_exist() -> None:
    for name in sorted(SLOW_TESTS):
        file, *path = name.split("::")
        nodes = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        for part in path:
            found = [each for each in nodes if isinstance(each, ast.FunctionDef | ast.ClassDef) and each.name == part]
            assert found, f"tests/slow.txt names {name}, which does not exist"
            nodes = found[0].body
