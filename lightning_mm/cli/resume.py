"""Where a run goes on: ``--ckpt_path last``, ``best`` or ``auto``, and the curves of the run before.

Data flow: a word, or a path -> the checkpoint of the newest run of that name -> its curves, up to its step, in the
folder of the run that goes on.
"""

import csv
import re
from pathlib import Path

from lightning_mm.cli.explain_errors import suggestion
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json
from lightning_mm.core.run_directory import RunDirectory

_WORDS = ("last", "best", "auto")


def find_checkpoint(asked: str, root: str | Path, name: str) -> Path | None:
    """The checkpoint that ``--ckpt_path`` means.

    Args:
        asked: A file; a run's folder (its ``last.ckpt``); ``last`` or ``best``: of the newest run of this name that
            has one; ``auto``: as ``last``, or None where there is none, which begins from the start.
        root: Folder of all runs.
        name: Name of the run; NAME-2, NAME-3, ... are runs of that name too.

    Raises:
        UserError: There is no such checkpoint.
    """
    if asked not in _WORDS:
        path = Path(asked)
        if path.is_dir():
            return RunDirectory(path).checkpoints / "last.ckpt"
        if path.suffix or path.exists() or len(path.parts) > 1:
            return path
        hint = suggestion(asked, _WORDS) or f"Name a file, or one of {', '.join(_WORDS)}."
        raise UserError(f"There is no checkpoint {asked}.", f"It is no file, and none of {', '.join(_WORDS)}.", hint)
    file = "best.ckpt" if asked == "best" else "last.ckpt"
    runs = _runs_of(Path(root), name)
    found = next((run.checkpoints / file for run in runs if (run.checkpoints / file).is_file()), None)
    if found is not None:
        log_decision("ckpt_path", found, f"{asked} of the newest run named {name}")
    elif asked == "auto":
        log_decision("ckpt_path", "from the start", f"no run named {name} in {root} has a last.ckpt")
    else:
        has = f"{len(runs)} runs of that name have none." if runs else f"There is no run of that name in {root}."
        raise UserError(f"--ckpt_path {asked}: no {file} of a run named {name}.", has, "Name the run by --run.name.")
    return found


def continue_metrics(earlier: RunDirectory, run: RunDirectory, step: int) -> None:
    """Copy the first run's curves up to the step that the run resumes at, each step once.

    Training logs a step under the number of steps before it, inspections under the number of steps done.

    Args:
        earlier: The run that the checkpoint is of.
        run: The run that goes on.
        step: Optimizer steps done in the checkpoint.
    """
    if not earlier.metrics.is_file():
        return
    with (
        earlier.metrics.open(encoding="utf-8", newline="") as source,
        run.metrics.open("w", encoding="utf-8", newline="") as to,
    ):
        reader = csv.DictReader(source)
        writer = csv.DictWriter(to, reader.fieldnames or ["step"], lineterminator="\n")
        writer.writeheader()
        for row in (row for row in reader if row["step"]):
            inspected = {key: value for key, value in row.items() if value and key.startswith(("inside/", "inspect/"))}
            if int(row["step"]) < step:
                writer.writerow(row)
            elif int(row["step"]) == step and inspected:
                writer.writerow({"step": row["step"], **inspected})
    log_decision("run", f"curves continue those of {earlier.name}", f"resumed at step {step}")


def _runs_of(root: Path, name: str) -> list[RunDirectory]:
    """Runs of a name, the newest first."""
    pattern = re.compile(rf"{re.escape(name)}(?:-(\d+))?")
    dated = []
    for folder in root.iterdir() if root.is_dir() else ():
        if (match := pattern.fullmatch(folder.name)) and (folder / "run.json").is_file():
            created = str(read_json(folder / "run.json").get("created", ""))
            dated.append((created, int(match[1] or 1), folder))
    return [RunDirectory(folder.absolute()) for *_, folder in sorted(dated, reverse=True)]
