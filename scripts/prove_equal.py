"""Proves that a refactor changed no number: records what the command line computes, before and after, and compares.

    python scripts/prove_equal.py record FOLDER               # with the lightning_mm that is on the path
    python scripts/prove_equal.py compare FOLDER_A FOLDER_B   # exit 0: all is bit-identical; exit 1: what is not

Data flow: tiny models and rows, written here from fixed seeds -> every verb of ``python -m lightning_mm`` -> files of
runs, plans, exports and reports -> FOLDER/result.json: section -> key -> exact text (numbers as written, or the SHA-256
of a tensor or file) -> ``compare``. Only command line and files are used, so the script serves commits whose modules
lie elsewhere. Left out: what a clock or the process's memory gives, dates and ids of runs, Lightning's own entries in
checkpoints. Rewritten: FOLDER's path, and modules before a class in configs and reports. layers.csv holds 7 digits.
"""

import argparse
import csv
import difflib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, __version__

import lightning_mm

try:  # without torchvision, processors that take videos too are loaded in a scope of ours
    from lightning_mm.models.processor import optional_video_processor as PROCESSORS  # noqa: N812
except ImportError:
    from contextlib import nullcontext as PROCESSORS  # noqa: N812

    import lightning_mm.models.processing  # patches transformers on import

FAMILIES = ("llava", "qwen2_5_vl", "smolvlm", "internvl", "gemma3")
VERBS = ("fit", "validate", "test", "predict", "plan", "inspect", "trace", "edit", "export", "report")
SPLITS = ("train", "val", "test")
COLOURS = ("red", "green", "blue", "white")
PROSE = ("help", "reasons")  # sections that may be reworded: told, but failing with --strict-help only
TIMED = re.compile(r"per_second$|/mfu$|/data_wait$|/peak_memory$|^inspect/")  # columns of metrics.csv
DROPPED = re.compile(r"\blightning_mm\.(?:\w+\.)*(?=\w)|\b20\d\d-\d\d-\d\d \d\d:\d\d\b")  # modules and dates
KEPT = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "lightning_mm")  # of a checkpoint
RUNNER = """
import json, runpy, shlex, sys
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv, sys.stdout = ["lightning_mm", *shlex.split(arguments)], open(f"logs/{name}.out", "w")
    try:
        runpy.run_module("lightning_mm", run_name="__main__", alter_sys=True)
    except SystemExit as done:
        if done.code:
            raise
"""


def conversations(folder: Path, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of uneven length about pictures of one colour; the fourth has no picture."""
    draw, rows = random.Random(seed), []
    for index in range(count):
        colour, name, turns = draw.choice(COLOURS), f"{split}-{index}.png", []
        Image.new("RGB", (40 + index % 5, 36), colour).save(folder / name)
        for turn in range(draw.randint(1, 3)):
            asked = f"What colour is this {'big old ' * draw.randint(0, 3)}thing?"
            asked = f"<image>\n{asked}" if turn == 0 and index != 3 else asked
            told = f"It is {colour}{' indeed' * draw.randint(0, 4)}."
            turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": told, "type": colour}]
        rows.append({"id": f"row-{index}", "conversations": turns, **({"image": name} if index != 3 else {})})
    return rows


def probes(folder: Path, count: int) -> list[dict[str, Any]]:
    """Pictures of two squares, no two alike, with what is true and false of them."""
    things, rows = [(size, colour) for size in (8, 12, 18) for colour in COLOURS], []
    scenes = [(a, b, g) for a in things for b in things for g in ("black", "grey", "purple") if a[1] != b[1]]
    for index, (one, two, ground) in enumerate(random.Random(0).sample(scenes, count)):
        picture, objects, name = Image.new("RGB", (40, 40), ground), [], f"probe-{index}.png"
        for (side, colour), left in ((one, 0), (two, 20)):
            picture.paste(colour, box := (left, 10, left + side, 10 + side))
            objects.append({"name": colour, "box": box})
        picture.save(folder / name)
        wrong = next(colour for colour in COLOURS if colour not in (one[1], two[1]))
        said = [f"{one[0]} of {first} and {two[0]} of {two[1]} on {ground}" for first in (one[1], wrong)]
        rows.append({"id": name, "image": name, "caption": said[0], "false_captions": said[1:], "objects": objects})
    return rows


def prepare(folder: Path) -> None:
    """Write models and data."""
    try:
        from lightning_mm.testing.tiny import build_tiny
    except ImportError:
        from lightning_mm.models.tiny import build_tiny
    for family in FAMILIES:
        build_tiny(family, folder / "models" / family)
    data = folder / "data"
    files = {split: conversations(data, split, 4 + 4 * (seed == 0), seed) for seed, split in enumerate(SPLITS)}
    near = [{"question": f"Which is {word} thing?", "image": "probe-0.png"} for word in "bcdf"]
    asked = [{**one, "id": w, "constraint": w, "answer": a} for one, w, a in zip(near, "bcdf", "aeio", strict=True)]
    turns = ([("human", f"<image>\n{one['question']}"), ("gpt", one["answer"])] for one in asked)
    told = [{"image": "probe-0.png", "conversations": [{"from": f, "value": v} for f, v in turn]} for turn in turns]
    more = {"paraphrases": ["Which is the d thing?"], "other_images": ["probe-1.png"], "neighbours": near[:2]}
    edits: list[dict[str, Any]] = [{**asked[2], "new_answer": "e", **more}, {**asked[3], "new_answer": "i"}, asked[0]]
    files |= {"told": told, "probes": probes(data, 24), "questions": asked, "edits": edits}
    for name, content in files.items():
        (data / f"{name}.json").write_text(json.dumps(content))


def fit(run: str, more: str, family: str = "llava", verb: str = "fit") -> str:
    """Arguments of a run of four steps, which is one epoch."""
    files = " ".join(f"--data.{split} data/{split}.json" for split in SPLITS)
    trainer = "--trainer.accelerator cpu --trainer.max_steps 4 --trainer.log_every_n_steps 1 --model.optimizer.lr 1e-2"
    loader = f"--data.num_workers 0 --data.batch_size 2 --run.wandb off --run.name {run}"
    return f"{verb} --model.backbone.path models/{family} {files} {trainer} {loader} {more}"


def stages() -> Iterator[list[dict[str, str]]]:
    """Processes, each with its commands by name; those of a stage need what earlier stages wrote."""
    middle, asked = "--model.tuning IntermediateOnly --model.tuning.layers 1-2", "--data.probes data/probes.json"
    odd = "--model.tuning PerRegion --model.tuning.layers 1-2 --model.tuning.layers_mode lora --data.max_tokens 256"
    told = "--model.tuning Full --model.tuning.head full --data.train data/told.json --trainer.limit_val_batches 0"
    look = "{class_path: %sCallback, init_args: {schedule: {every: 2, budget: null}}}"  # a budget goes by the clock
    runs = {
        "full": "--model.tuning Full",
        "lora": "--model.tuning LoRAOnMiddle",
        "connector": "--model.tuning ConnectorOnly --model.cache.mode on --trainer.max_steps 8",
        "cache": f"{middle} --model.cache.mode on --trainer.max_steps 8",
        "auto": f"--model.tuning IntermediateOnly --model.tuning.layers auto:2 --model.auto.resamples 4 {asked}",
        "checkpointing": "--model.tuning Full --model.activation_checkpointing true",
        "bf16": f"{middle} --trainer.precision bf16-mixed",
        "odd": f"{odd} --model.tuning.connector full --trainer.accumulate_grad_batches 2",
        "inside": f"{middle} {asked} --trainer.callbacks '[{look % 'Probing'}, {look % 'Geometry'}, {look % 'Drift'}]'",
        "told": f"{told} --trainer.max_steps 100 --data.batch_size 4",
        "causal": f"{middle} {asked} --trainer.callbacks '[{look % 'Causal'}]' --trainer.max_steps 2",
    }
    fits = {f: fit(f, middle, f) for f in FAMILIES} | {run: fit(run, more) for run, more in runs.items()}
    plans = {f: fit("none", f"{middle} --device h200 --json plans/{f}.json", f, "plan") for f in FAMILIES}
    helps = {"help": "--help", **{f"help-{verb}": f"{verb} --help" for verb in VERBS}}
    yield [*({f"fit-{run}": each} for run, each in fits.items()), {f"plan-{f}": p for f, p in plans.items()}, helps]
    saved = "-c runs/llava/config.yaml --ckpt_path runs/llava/checkpoints/last.ckpt --run.name"
    exports = {"proved": "runs/gemma3 --prove true", **{f: f"runs/{f} --prove false" for f in FAMILIES}}
    exports |= {form: f"runs/lora --format {form} --prove false" for form in ("adapter", "merged")}
    read = "--probes data/probes.json --images 24 --measures [all]"
    second = {
        "inspect": f"models/llava --against runs/llava {read} --data data/train.json --auto.resamples 4 --name inspect",
        "inspect-gemma3": f"models/gemma3 {read} --select false --name inspect-gemma3",
        "trace": "runs/told --against runs/llava --questions data/questions.json --data data/val.json --name trace",
        "edit": "runs/told --edits data/edits.json --steps 4 --prove false --out exports/edited --name edit",
        "fit": f"{saved} fit --trainer.max_steps 6",
        "test": f"{saved} test",
        "predict": f"{saved} predict --data.predict data/test.json",
    }
    exporting = {f"export-{out}": f"export --out exports/{out} {of}" for out, of in exports.items()}
    yield [exporting, *({name: f"{name.partition('-')[0]} {more}"} for name, more in second.items())]
    yield [{f"report-{run}": f"report runs/{run}" for run in (*fits, *second)}]


def run(folder: Path, commands: dict[str, str]) -> None:
    """Run commands in one process, which must succeed; what it says is in FOLDER/logs."""
    name, began = next(iter(commands)), time.perf_counter()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LIGHTNING_MM", "WANDB"))}
    kept |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
    kept |= {"PYTHONPATH": str(Path(lightning_mm.__file__).parents[1]), "XDG_CACHE_HOME": f"{folder}/caches/{name}"}
    command = [sys.executable, "-c", RUNNER, json.dumps(commands)]
    with (folder / "logs" / f"{name}.err").open("w") as file:
        subprocess.run(command, cwd=folder, env=kept, stderr=file, check=True)
    print(f"{time.perf_counter() - began:5.1f} s  {name}{' ...' if len(commands) > 1 else ''}", flush=True)


def table(path: Path) -> list[dict[str, str]]:
    """A CSV file, without columns that are timed."""
    with path.open(newline="") as file:
        return [{key: cell for key, cell in row.items() if not TIMED.search(key)} for row in csv.DictReader(file)]


def without_times(run: Path) -> None:
    """Take what a clock has measured out of a run's files: they, and the report drawn of them, are compared."""
    for path in run.glob("metrics.csv"):
        rows = table(path)
        path.write_text("".join(",".join(cells) + "\n" for cells in (rows[0], *(row.values() for row in rows))))
    (run / "run.json").write_text(json.dumps({"name": run.name, "id": "0", "created": "2000-01-01T00:00:00+00:00"}))
    fixed = {"seconds": {"forward": 0, "analyses": 0}, "share": None}
    for path in (*run.glob("decisions.json"), *run.glob("inspections.json")):
        held = [each for each in json.loads(path.read_text()) if each.get("name") != "throughput.peak"]
        path.write_text(json.dumps([{key: fixed.get(key, value) for key, value in each.items()} for each in held]))


def flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of nested dicts and lists as exact text, tensors as the hash of their bytes."""
    value = sorted(value) if key == "/target_modules" else value  # PEFT keeps a set
    if isinstance(value, list | tuple) and len(value) > 99 and isinstance(value[0], int):  # a generator's state
        yield key, sha256(repr(value).encode()).hexdigest()
    elif isinstance(value, Mapping | list | tuple):
        yield f"{key}/len", str(len(value))
        for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from flat(item, f"{key}/{name}")
    elif isinstance(value, torch.Tensor):
        raw = value.detach().flatten().view(dtype=torch.uint8).numpy()
        yield key, f"{value.dtype} {tuple(value.shape)} {sha256(raw.tobytes()).hexdigest()}"
    else:
        yield key, repr(value)


def leaves(path: Path) -> Iterator[tuple[str, str]]:
    """What a file holds, by its place in the file; all of it is text that can be compared."""
    if path.name == "layers.csv":
        rows = [list(row.values()) for row in table(path)]  # step, analysis, measure, site and layer name a row
        yield from (("/" + ",".join(cells[:5]), "|".join(cells[5:])) for cells in rows)
    elif path.suffix in (".jsonl", ".yaml", ".html", ".out", ".md", ".jinja"):
        yield "", path.read_text()
    elif path.suffix == ".ckpt":
        yield from flat({name: held for name, held in torch.load(path, weights_only=True).items() if name in KEPT})
    elif path.suffix in (".csv", ".safetensors"):
        yield from flat(table(path) if path.suffix == ".csv" else load_file(path))
    elif path.suffix == ".json":
        yield from flat(json.loads(path.read_text()))
    else:
        yield "", sha256(path.read_bytes()).hexdigest()


def logits(export: Path, base: Path) -> Iterator[tuple[str, str]]:
    """What an exported model says to a fixed picture and question, loaded by transformers (and PEFT) alone."""
    whole = base if (export / "adapter_config.json").exists() else export
    model: Any = AutoModelForImageTextToText.from_pretrained(whole)
    with PROCESSORS():
        processor: Any = AutoProcessor.from_pretrained(whole)  # type: ignore[no-untyped-call]
    picture = {"type": "image", "image": Image.radial_gradient("L").convert("RGB").resize((48, 40))}
    turns = [{"role": "user", "content": [picture, {"type": "text", "text": "What colour is this?"}]}]
    inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
    found = (model if whole == export else PeftModel.from_pretrained(model, export)).eval()(**inputs).logits.detach()
    yield from flat({"logits": found, "last": found[0, -1, :8].tolist()}, export.name)


def collect(folder: Path) -> dict[str, dict[str, str]]:
    """Everything that is compared: section -> key -> text."""
    result: dict[str, dict[str, str]] = {"logits": {}}
    named = {"metrics.csv": "metrics", "layers.csv": "layers", ".ckpt": "checkpoints", ".html": "reports"}
    files = [path for top in ("runs", "plans", "exports", "logs") for path in (folder / top).rglob("*.*")]
    for path in sorted(path for path in files if path.is_file() and path.suffix != ".err"):
        key = str(path.relative_to(folder))
        section = named.get(path.name, named.get(path.suffix, key.partition("/")[0]))
        section = "help" if path.name.startswith("help") else section
        for leaf, value in leaves(path):
            kind = "reasons" if path.name == "decisions.json" and leaf.endswith("/reason") else section
            text = DROPPED.sub("", value) if path.suffix in (".html", ".yaml") else value
            result.setdefault(kind, {})[key + leaf] = text.replace(str(folder), "FOLDER")
    for export in sorted((folder / "exports").iterdir()):
        result["logits"].update(logits(export, folder / "models" / "llava"))
    return result


def record(folder: Path, jobs: int) -> int:
    """Run everything and write FOLDER/result.json."""
    began = time.perf_counter()
    torch.set_num_threads(1)
    for name in ("logs", "plans", "exports", "data"):
        (folder / name).mkdir(parents=True)  # a folder that is taken is refused here
    prepare(folder)
    for number, processes in enumerate(stages()):
        for done in (folder / "runs").iterdir() if number == 2 else ():
            without_times(done)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda commands: run(folder, commands), processes))
    result = collect(folder)
    result["machine"] = {"is": f"{torch.backends.cpu.get_cpu_capability()}, {torch.__version__}, {__version__}"}
    (folder / "result.json").write_text(json.dumps(result, indent=0))
    print(f"{sum(map(len, result.values()))} values of {folder} after {time.perf_counter() - began:.0f} s")
    return 0


def compare(first: Path, second: Path, strict: bool) -> int:
    """Tell every difference; 0 where there is none that counts."""
    one, two = (json.loads((folder / "result.json").read_text()) for folder in (first, second))
    told, failed = [], not one
    for section in sorted({*one, *two}, key=lambda name: (name in PROSE, name)):
        a, b = one.get(section, {}), two.get(section, {})
        wrong = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        print(f"{section:12} {len({**a, **b}):6} values, {len(wrong):6} unlike or on one side only")
        for key in wrong:
            here, there = (held.get(key, "(none)").splitlines() for held in (a, b))
            told += [f"{section}: {key}", *list(difflib.unified_diff(here, there, lineterm="", n=0))[2:]]
        failed |= bool(wrong) and (strict or section not in PROSE)
    verdict = "NOT EQUAL" if failed else "equal, but for the prose above" if told else "all equal, bit for bit"
    print("\n".join([*told, verdict]))
    return int(failed)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("record", "compare"))
    parser.add_argument("folders", type=Path, nargs="+", help="record: one; compare: two")
    parser.add_argument("--jobs", type=int, default=1, help="record: processes at a time, of one core each")
    parser.add_argument("--strict-help", action="store_true", help=f"compare: fail where {' or '.join(PROSE)} differ")
    options = parser.parse_args()
    first, *others = (folder.absolute() for folder in options.folders)
    return compare(first, others[0], options.strict_help) if options.verb == "compare" else record(first, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
