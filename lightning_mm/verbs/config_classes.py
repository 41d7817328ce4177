"""The check of the classes that config files name: parsing one imports it, which runs its package's code.

Data flow: arguments or a file's content -> every key whose value becomes a class -> ``UserError`` where it is foreign.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_mm.core.errors import UserError

ALLOWED = ("lightning", "torch", "lightning_mm", "torchmetrics")
"""Where a config's ``class_path`` may point without ``--allow``."""


def refuse_foreign_classes(arguments: list[str]) -> None:
    """Refuse config files that name classes of packages not allowed: parsing a class imports it.

    Args:
        arguments: Command line arguments; all YAML files that they name are read, and all that these name.

    Raises:
        UserError: A file names such a class; the message has file, key and class.
    """
    values = [argument.rpartition("=")[2] for argument in arguments]
    allowed = [values[i + 1] for i, argument in enumerate(arguments[:-1]) if argument == "--allow"]
    allowed += [argument.partition("=")[2] for argument in arguments if argument.startswith("--allow=")]
    names = [name for value in allowed for name in value.split(",") if name]
    for value in values:
        _scan_file(Path(value), _prefixes(names))


def read_checked_yaml(path: Path, sections: Sequence[str]) -> dict[str, Any]:
    """Some sections of a YAML file, which name no foreign classes.

    Args:
        path: The file.
        sections: Keys of its top level.

    Raises:
        UserError: The file cannot be read, lacks a section, or names a foreign class in one.
    """
    content = _load(path)
    if not isinstance(content, dict) or (missing := [key for key in sections if key not in content]):
        lacking = missing if isinstance(content, dict) else list(sections)
        raise UserError(f"{path} is no config of a run.", f"It has no {', '.join(lacking)}.", "Name a run of fit.")
    kept = {key: content[key] for key in sections}
    _scan(kept, path, "", _prefixes())
    return kept


def _prefixes(names: Sequence[str] = ()) -> tuple[str, ...]:
    return tuple(f"{name.rstrip('.')}." for name in (*ALLOWED, *names))


def _scan_file(path: Path, prefixes: tuple[str, ...]) -> None:
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return
    _scan(_load(path), path, "", prefixes)


def _load(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read.", " ".join(str(error).split()), "Mend the YAML there.") from error


def _scan(content: Any, path: Path, key: str, prefixes: tuple[str, ...]) -> None:
    if isinstance(content, dict):
        for name, value in content.items():
            _scan(value, path, f"{key}.{name}" if key else str(name), prefixes)
    elif isinstance(content, list):
        for index, value in enumerate(content):
            _scan(value, path, f"{key}[{index}]", prefixes)
    elif isinstance(content, str):
        _scan_file(path.parent / content, prefixes)
        # A bare name ('Full') is resolved within this package; a dotted one is imported.
        dotted = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", content)
        if dotted and not f"{content}.".startswith(prefixes) and _names_class(key):
            raise UserError(
                f"{path}: {key}: {content} is not loaded.",
                f"Config files may name classes of {', '.join(p.rstrip('.') for p in prefixes)} only.",
                f"If you trust it: --allow {content.partition('.')[0]}",
            )


def _names_class(key: str) -> bool:
    """Whether jsonargparse resolves the key's value to a class: class_path itself, and options that are classes."""
    last = re.sub(r"\[\d+\]$", "", key).rpartition(".")[2].rstrip("+")
    return last in ("class_path", "tuning", "callbacks", "logger", "strategy", "profiler", "plugins")
