"""Config files that come with the package, found by name from any folder: ``-c trainer/gpu.yaml``.

Data flow: arguments -> every ``-c NAME`` that is no file in the current folder -> the shipped file of that name.
"""

import difflib
from pathlib import Path

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError

_OPTIONS = ("-c", "--config")
_PACKAGE = Path(__file__).parents[1]


def shipped_folder() -> Path:
    """``lightning_mm/configs`` of an installed wheel, ``configs`` at the top of a clone."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def shipped_names() -> list[str]:
    """Names of all shipped files, such as ``trainer/gpu.yaml``."""
    folder = shipped_folder()
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*.yaml"))


def find_configs(arguments: list[str]) -> list[str]:
    """The arguments with the path of a shipped file in place of its name.

    A file in the current folder comes first. A shipped file may be named as in a clone (``configs/trainer/gpu.yaml``)
    and without ``.yaml``.

    Args:
        arguments: Command line arguments.

    Raises:
        UserError: There is no file of a name, neither here nor shipped.
    """
    found = list(arguments)
    for index, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option in _OPTIONS and value:
            found[index] = f"{option}={_config(value)}"
        elif index and arguments[index - 1] in _OPTIONS:
            found[index] = _config(argument)
    return found


def _config(given: str) -> str:
    if Path(given).is_file():
        _check_text(Path(given))
        return given
    if "\n" in given or given.lstrip().startswith("{"):  # YAML itself
        return given
    names = shipped_names()
    wanted = given.removeprefix("./").removeprefix("configs/")
    for name in (wanted, f"{wanted}.yaml"):
        if name in names:
            path = shipped_folder() / name
            log_decision("config", name, f"no file {given} in this folder; it comes with the package")
            return str(path)
    here = [str(file) for file in Path(given).parent.glob("*.y*ml")]
    near = difflib.get_close_matches(given, here, n=1)
    near += difflib.get_close_matches(f"{wanted.removesuffix('.yaml')}.yaml", names, n=1)
    raise UserError(
        f"There is no file {given}.",
        "It is neither in this folder nor one of the files that come with the package.",
        f"Did you mean {near[0]}?" if near else f"Shipped files: {', '.join(names)}.",
    )


def _check_text(file: Path) -> None:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} cannot be read.", str(error), "Name a file of options, in YAML.") from error
