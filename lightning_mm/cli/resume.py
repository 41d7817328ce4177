"""Where a run goes on: ``--ckpt_path last``, ``best`` or ``auto``, and what the run before has left.

Data flow: a word, or a path -> the checkpoint of the newest run of that name -> its own folder, taken back to the step
of the checkpoint; or, under another name, its curves and findings up to that step in a folder of its own.
"""

import csv
import io
import json
import re
from pathlib import Path
from shutil import copyfile

from lightning_mm.analysis.findings import copy_earlier_findings
from lightning_mm.cli.explain_errors import suggestion
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json, read_jsonl, write_atomically
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.training.unfinished import AfterStep

_WORDS = ("last", "best", "auto")
_NOTHING = AfterStep()


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


def own_folder(checkpoint: Path, name: str | None) -> RunDirectory | None:
    """The folder that a run goes on in: that of its ``last.ckpt``, unless it is to have another name; else None.

    Args:
        checkpoint: What it goes on from. From ``best.ckpt`` or a file elsewhere it goes on in a new folder: its own
            holds what came later.
        name: ``run.name``; None: not given.
    """
    run = RunDirectory(checkpoint.absolute().parent.parent)
    is_runs = checkpoint.absolute() == run.checkpoints / "last.ckpt" and (run.path / "run.json").is_file()
    same = name is None or re.fullmatch(rf"{re.escape(name)}(-\d+)?", run.name) is not None
    return run if is_runs and same else None


def begun_anew(root: str | Path, name: str) -> RunDirectory | None:
    """The folder of the newest run of a name, emptied, if that run was killed before its first checkpoint; else None.

    A job that is started again with ``--ckpt_path auto`` so has one folder, whenever it was killed. A run that came to
    its end has a report, and stays, also where it was told to save no checkpoint.

    Args:
        root: Folder of all runs.
        name: Name of the run.
    """
    run = next(iter(_runs_of(Path(root), name)), None)
    if run is None or run.kind != "fit" or run.report.exists() or (run.checkpoints / "last.ckpt").exists():
        return None
    if not run.claim():
        return None
    run.clear()
    log_decision("run", f"begins anew in {run.path}", "the run there was killed before its first checkpoint")
    return run


def take_over(earlier: RunDirectory, run: RunDirectory, step: int, left: AfterStep) -> None:
    """Put what a run has logged and found up to a step into the folder of the run that goes on, each step once.

    Args:
        earlier: The run that the checkpoint is of.
        run: The run that goes on; the same folder, or a new one.
        step: Optimizer steps done in the checkpoint.
        left: What is to be done yet behind that step.
    """
    continue_metrics(earlier, run, step, left)
    copy_earlier_findings(earlier, run, step)
    if earlier.ledger.is_file() and earlier.path != run.path:
        copyfile(earlier.ledger, run.ledger)
    if (answers := earlier.path / "generations.jsonl").is_file():
        last = step - 1 if left.validate else step
        rows = [row for row in read_jsonl(answers)[0] if row.get("step", 0) <= last]
        write_atomically(run.path / answers.name, "".join(json.dumps(row) + "\n" for row in rows))


def continue_metrics(earlier: RunDirectory, run: RunDirectory, step: int, left: AfterStep = _NOTHING) -> None:
    """Write the first run's curves up to the step that the run resumes at, each step once.

    Training logs a step under the number of steps before it, inspections under the number of steps done.

    Args:
        earlier: The run that the checkpoint is of.
        run: The run that goes on; the same folder, or a new one.
        step: Optimizer steps done in the checkpoint.
        left: What is to be done yet behind that step; what it has logged already comes again, and is left out.
    """
    if not earlier.metrics.is_file():
        return
    written = earlier.metrics.read_text(encoding="utf-8")
    reader = csv.DictReader(written[: written.rfind("\n") + 1].splitlines())  # a kill may have cut the last line
    text = io.StringIO()
    writer = csv.DictWriter(text, reader.fieldnames or ["step"], lineterminator="\n")
    writer.writeheader()
    for row in (row for row in reader if row["step"]):
        inspected = {key: value for key, value in row.items() if value and key.startswith(("inside/", "inspect/"))}
        if left.validate and int(row["step"]) == step - 1:
            row = {key: value for key, value in row.items() if not key.startswith("val/")}
            if not any(value for key, value in row.items() if key not in ("step", "epoch")):
                continue
        if int(row["step"]) < step:
            writer.writerow(row)
        elif int(row["step"]) == step and inspected and not left.ends:
            writer.writerow({"step": row["step"], **inspected})
    write_atomically(run.metrics, text.getvalue())
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
