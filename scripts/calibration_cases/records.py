"""Outcomes of simulated models on disk, one line each, so that a run that was stopped goes on where it was.

A record holds the digest of the code that it rests on (comments and docstrings left out): where that changes, the
records of before count no more.

Data flow: case, seeds -> ``simulate``: one model after another -> ``FOLDER/family_size_design_kind.jsonl``.
"""

import ast
import functools
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch

from calibration_cases.case import Case, Outcome, Reading

PACKAGE = Path(__file__).parents[2] / "lightning_mm"


@dataclass(frozen=True)
class Record:
    """One model.

    Args:
        seed: Of its draw.
        outcome: What the product says of it.
        seconds: That it took.
    """

    seed: int
    outcome: Outcome
    seconds: float


@functools.cache
def code_digest(rests_on: tuple[str, ...]) -> str:
    """Digest of the package's files in some rooms."""
    files = [path for name in rests_on for path in sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / name]]
    trees = [_without_docstrings(ast.parse(path.read_text(encoding="utf-8"))) for path in files]
    return hashlib.sha256("".join(trees).encode()).hexdigest()


def _without_docstrings(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            body[:] = [one for one in body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    return ast.dump(tree)


def key_of(case: Case) -> str:
    """What must be the same for records to count: the code, and the design in words and numbers."""
    design = repr((case.about, getattr(case.draw, "keywords", {}), getattr(case.measure, "keywords", {})))
    return hashlib.sha256((code_digest(case.rests_on) + design).encode()).hexdigest()[:16]


def path_of(folder: Path, case: Case) -> Path:
    """File of a case's records."""
    return folder / (case.name.replace("/", "_").replace(" ", "-") + ".jsonl")


def read(folder: Path, case: Case) -> dict[int, Record]:
    """The records of a case by seed: those of the code as it is; a last line that was cut off is left out."""
    path, key = path_of(folder, case), key_of(case)
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["key"] == key:
            readings = [Reading(**reading) for reading in row["readings"]]
            found[row["seed"]] = Record(row["seed"], Outcome(readings, row["profiles"]), row["seconds"])
    return found


def simulate(case: Case, seeds: range, folder: Path, pool: Pool | None = None) -> list[Record]:
    """The records of all seeds; those that are missing are simulated and appended to the file.

    Args:
        case: The design.
        seeds: Of the models.
        folder: Of the records.
        pool: Processes to simulate in; None: this one.
    """
    known, key = read(folder, case), key_of(case)
    missing = [(case, seed) for seed in seeds if seed not in known]
    folder.mkdir(parents=True, exist_ok=True)
    with path_of(folder, case).open("a", encoding="utf-8") as file:
        for record in _made(missing, pool):
            file.write(json.dumps({"key": key, **_told(record)}) + "\n")
            file.flush()
            known[record.seed] = record
    return [known[seed] for seed in seeds]


def _made(missing: list[tuple[Case, int]], pool: Pool | None) -> Iterator[Record]:
    return map(run_one, missing) if pool is None else pool.imap_unordered(run_one, missing)


def run_one(job: tuple[Case, int]) -> Record:
    """One model of a case."""
    case, seed = job
    torch.set_num_threads(1)
    began = time.perf_counter()
    outcome = case.measure(case.draw(seed))
    return Record(seed, outcome, time.perf_counter() - began)


def _told(record: Record) -> dict[str, Any]:
    """A record in JSON types; of readings the fields that are not as they are by default."""
    plain = asdict(Reading(""))
    told = [
        {name: value for name, value in asdict(reading).items() if value != plain[name]}
        for reading in record.outcome.readings
    ]
    return {
        "seed": record.seed,
        "seconds": round(record.seconds, 3),
        "readings": told,
        "profiles": record.outcome.profiles,
    }
