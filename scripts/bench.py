"""Training by the product, by TRL's SFTTrainer and by transformers' Trainer: time, memory, start-up, equal losses.

    python scripts/bench.py            # everything into benchmarks/training.json, and the table of docs/speed-and-memory.md
    python scripts/bench.py --table    # the table again, from that file

Same model, rows, order, rows per batch and arithmetic. The arms take turns, each in a process of its own that loads
once and is timed over the same batches; medians over the rounds. In the first round every arm goes on to --steps, and
its batches and losses are compared with the product's. The rivals live in their own environment (.venv-rivals, made
on the first call).
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_rivals.arms import ARMS, Arm, growth
from bench_rivals.environment import rivals_python
from bench_rivals.results import compared, grown, machine
from bench_rivals.rows import resized, write_rows
from bench_rivals.running import RunFailed, Setting, run, warmed
from bench_rivals.table import write_table

IMAGE_SIZES = (56, 112, 168, 224)


def main() -> None:
    """Measure and write down, or write the table only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="Only write the table of docs/speed-and-memory.md from the results.")
    parser.add_argument("--part", choices=("rivals", "growth", "all"), default="all")
    parser.add_argument("--arms", default="", help="Only arms whose key contains one of these, as a,b.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="Of the first round, for the losses.")
    parser.add_argument("--warm_up", type=int, default=3)
    parser.add_argument("--timed", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", type=Path, default=Path("nano/model"))
    parser.add_argument("--data", type=Path, default=Path("nano/data/train.json"))
    parser.add_argument("--rivals", type=Path, default=Path(".venv-rivals"), help="Their environment.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/training.json"))
    parser.add_argument("--readme", type=Path, default=Path("docs/speed-and-memory.md"), help="Where the table goes.")
    args = parser.parse_args()
    if not args.table:
        with tempfile.TemporaryDirectory() as work:
            measure(args, Path(work))
    result = _read(args.out)
    if "rivals" in result:
        write_table(result, args.readme)
    elif args.table:
        raise SystemExit(f"{args.out} holds no comparison yet; run without --table.")


def measure(args: argparse.Namespace, work: Path) -> None:
    """Run what was asked for; each part is kept in the file as soon as it is whole."""
    setting = Setting(
        model=args.model.resolve(),
        data=args.data.resolve(),
        rows=work / "rows.json",
        work=work,
        rivals=rivals_python(args.rivals.absolute()),
        batch_size=args.batch_size,
        warm_up=args.warm_up,
        timed=args.timed,
        precision=args.precision,
        accelerator=args.accelerator,
        threads=args.threads,
    )
    result = _read(args.out)
    if args.part in ("rivals", "all"):
        write_rows(setting.model, setting.data, setting.rows)
        chosen = [arm for arm in ARMS if _asked(args, arm)]
        result["rivals"] = {**machine(), **_condition(args), "arms": rivals(setting, chosen, args.rounds, args.steps)}
        _write(args.out, result)
    if args.part in ("growth", "all"):
        result["growth"] = {**machine(), **_condition(args), "axes": growing(setting, args)}
        _write(args.out, result)


def rivals(setting: Setting, arms: list[Arm], rounds: int, steps: int) -> dict[str, Any]:
    """All arms, one after the other, round by round."""
    for arm in arms:
        if arm.warm:
            warmed(setting, arm, steps)
    short = setting.warm_up + setting.timed
    runs: dict[str, list[dict[str, Any]]] = {arm.key: [] for arm in arms}
    for number in range(rounds):
        for arm in [arm for arm in arms if arm.key in runs]:
            try:
                measured = run(setting, arm, short if number else max(short, steps), batches=not number)
            except RunFailed as failed:
                if not arm.optional:
                    raise
                print(f"left out: {failed}", flush=True)
                del runs[arm.key]
                continue
            runs[arm.key].append(measured)
            _say(f"round {number + 1}", arm.key, measured)
    return compared([arm for arm in arms if arm.key in runs], runs)


def growing(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """The product's time against layers, image tokens, batch and ranks; what two axes share is run once."""
    models = {size: resized(setting.model, size, setting.work / f"model-{size}") for size in IMAGE_SIZES}
    every = growth({tokens: size for size, (_, tokens) in models.items()})
    points = [point for point in every if _asked(args, point.arm)]
    runs: dict[Any, list[dict[str, Any]]] = {point.conditions: [] for point in points}
    for number in range(args.rounds):
        for key, point in {point.conditions: point for point in points}.items():
            model = models[point.image_size][0]
            changed = replace(setting, model=model, batch_size=point.batch_size, ranks=point.ranks)
            runs[key].append(run(changed, point.arm, setting.warm_up + setting.timed))
            _say(f"round {number + 1}", point.arm.key, runs[key][-1])
    return grown(points, runs)


def _asked(args: argparse.Namespace, arm: Arm) -> bool:
    return any(key in arm.key for key in args.arms.split(","))


def _condition(args: argparse.Namespace) -> dict[str, Any]:
    return {
        key: getattr(args, key) for key in ("rounds", "warm_up", "timed", "steps", "batch_size", "precision", "threads")
    }


def _say(when: str, key: str, measured: dict[str, Any]) -> None:
    seconds, peak = measured["seconds_per_step"], measured["peak_bytes"] / 1e9
    told = f"{seconds:7.3f} s/step ({measured['cpu_seconds_per_step']:.3f} of processors), peak {peak:5.2f} GB"
    print(f"{when}: {key:24} {told}, first step after {measured['startup_seconds']:.1f} s", flush=True)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
