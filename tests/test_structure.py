"""The tests' own order: what they share is in ``tests/helpers``, and their folders are those of the package."""

import ast
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
