"""Whether intervals cover, chance is what is told and verdicts are right, by simulation.

    python scripts/calibration.py                                  # all cases, 300 models each: several hours
    python scripts/calibration.py --small                          # 60 models of the cases that take seconds
    python scripts/calibration.py --cases 'geometry/96/*' 'study/*' --models 300 --processes 4

For every statistic that is shown with an interval, a band of chance, a p-value or a verdict: models are drawn of a
design in which nothing is to be found (null), and of one in which something is (planted); the product's own functions
measure them; written are the share of models whose 95 % interval covers the truth, whose value lies outside the band of
chance, and in which something is called found (size where nothing is there, power where something is), each with the
binomial interval that the number of models allows. The truth of an interval is known, or the mean over all models.

Data flow: ``calibration_cases`` -> records (resumed where they are) -> benchmarks/calibration.json, after every case ->
docs/calibration.md, by scripts/readme_numbers.py.
"""

import argparse
import json
import multiprocessing
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from calibration_cases import all_cases
from calibration_cases.records import simulate
from calibration_cases.table import faults
from calibration_cases.tally import tally
from machine import processor

SMALL_MODELS = 60


def main() -> None:
    """Simulate the chosen cases and write what is found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["*"], help="Names, with * for any part.")
    parser.add_argument("--models", type=int, help="Of each case: 300, or 60 with --small.")
    parser.add_argument("--small", action="store_true", help="Only cases that take about a second per model or less.")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--records", type=Path, default=Path("runs/calibration"), help="Where models are kept.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/calibration.json"))
    parser.add_argument("--list", action="store_true", help="Print the cases and end.")
    args = parser.parse_args()
    known = all_cases()
    chosen = [
        case
        for name, case in known.items()
        if any(fnmatch(name, pattern) for pattern in args.cases) and (case.is_small or not args.small)
    ]
    if args.list or not chosen:
        print("\n".join(f"{case.name}: {case.about}" for case in (chosen or known.values())))
        return
    models = args.models or (SMALL_MODELS if args.small else 300)
    written = json.loads(args.out.read_text(encoding="utf-8"))["cases"] if args.out.is_file() else {}
    pool = multiprocessing.get_context("spawn").Pool(args.processes) if args.processes > 1 else None
    for case in chosen:
        entry = tally(case, simulate(case, range(models), args.records, pool))
        written[case.name] = entry
        write(args.out, {name: written[name] for name in known if name in written})
        print(f"{case.name}: {models} models, {entry['seconds_per_model']:.2f} s each", flush=True)
        for line in faults({case.name: entry}):
            print(f"  {line}", flush=True)
    if pool is not None:
        pool.close()


def write(path: Path, cases: dict[str, Any]) -> None:
    """Write all entries, and what they were simulated with."""
    told = {"machine": {"processor": processor(), "torch": torch.__version__}, "cases": cases}
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
