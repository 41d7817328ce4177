"""The order of tests and scripts: shared code is in ``tests/helpers``, folders mirror the package, names exist."""

import ast
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "lightning_mm"
FILES = sorted(TESTS.rglob("*.py"))


def imported_modules(file: Path) -> set[str]:
    """Dotted names of all modules that a file imports or imports from, ``from a import b`` as ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            names |= {parent, *(f"{parent}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TESTS)))
def test_only_helpers_are_imported(file: Path) -> None:
    """Importing a test module would collect its tests and fixtures twice and hide who needs what."""
    ours = [name.split(".") for name in imported_modules(file) if name.startswith((".", "tests"))]
    wrong = [".".join(parts) for parts in ours if any(p == "conftest" or p.startswith("test_") for p in parts)]
    assert not wrong


def test_folders_are_rooms_of_the_package() -> None:
    rooms = {folder.parent.relative_to(TESTS) for folder in TESTS.rglob("test_*.py")} - {Path()}
    assert rooms
    assert [str(room) for room in sorted(rooms) if not (PACKAGE / room).is_dir()] == []


SCRIPTS = sorted((TESTS.parent / "scripts").rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_name_what_exists(script: Path) -> None:
    """Scripts are not type-checked: what they import of the package and the test files that they name must exist."""
    text = script.read_text(encoding="utf-8")
    assert not [path for path in re.findall(r"tests/[\w/]+\.py", text) if not (TESTS.parent / path).exists()]
    tree = ast.parse(text)
    optional = {part for node in ast.walk(tree) if isinstance(node, ast.Try) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in optional:
            continue
        if (node.module or "").startswith("lightning_mm"):
            module = importlib.import_module(str(node.module))
            for each in node.names:
                assert hasattr(module, each.name) or find_spec(f"{node.module}.{each.name}"), each.name
