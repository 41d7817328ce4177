"""Configs that try to run code: a name that must not become an object, in every form and by every road.

Data flow: seed -> name x form x place x road -> ``HostileConfig`` (files, arguments, environment).
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CANARY = "hostile_canary"
"""A module that leaves a file behind when it is imported, and when what it holds is called."""
SOURCE = """from pathlib import Path
from lightning.pytorch.callbacks import Callback
from lightning_mm.tuning import Full
FIRED = Path(__file__).with_name("fired")
FIRED.touch()
def fire(*args, **kwargs):
    FIRED.touch()
class Called(Callback):
    __init__ = __call__ = fire
class Policy(Full):
    __post_init__ = fire
"""
_LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
_FOREIGN = tuple(f"{CANARY}.{name}" for name in ("Called", "Policy", "fire", "Called.fire", "nothing", "sub.module"))
_RE_EXPORTED = (
    "torch.os.system",
    "lightning_mm.study.run.subprocess.run",
    "lightning.pytorch.cli.os.popen",
    "torch.sys",
)
_RUNS_THINGS = (
    "torch.hub.load",
    "torch.load",
    "torch.utils.cpp_extension.load",
    "torch.distributed.launcher.api.elastic_launch",
    "lightning.pytorch.cli.LightningCLI",
    "lightning_mm.cli.main.run",
    "torch.jit.load",
)
NAMES = (*_FOREIGN, *_RE_EXPORTED, *_RUNS_THINGS)
_PLACES = ("callbacks", "callbacks+", "logger", "plugins", "strategy", "profiler", "tuning", "callable", "deep")
_SUFFIXES = (".yaml", ".yml", ".json", ".txt", ".cfg", "", ".YAML", ".py")
ROADS = ("file", "sub-config", "nested file", "environment", "default file", "run folder")


@dataclass(frozen=True)
class HostileConfig:
    """One attempt.

    Args:
        label: What it tries, for messages.
        road: How the options arrive; one of ``ROADS``.
        options: What the files say.
        files: Name -> content; the first is the one that is named.
        environment: Variables that are set.
    """

    label: str
    road: str
    options: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def hostile_configs(seed: int, count: int) -> Iterator[HostileConfig]:
    """Attempts, the same ones for the same seed; every name and every road comes before any comes again."""
    draw = random.Random(seed)
    for index in range(count):
        name, road = NAMES[index % len(NAMES)], ROADS[index % len(ROADS)]
        place = "tuning" if road == "run folder" else draw.choice(_PLACES)
        form = _form(draw, name)
        label = f"{seed}:{index} {road} {place} {form!r}"
        yield _sent(draw, label, road, _placed(draw, place, form))


def write_files(attempt: HostileConfig, folder: Path) -> Path | None:
    """Write the files of an attempt; returns the one that is named."""
    for name, content in attempt.files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder / next(iter(attempt.files)) if attempt.files else None


def _form(draw: random.Random, name: str) -> Any:
    spec: dict[str, Any] = {"class_path": name}
    return draw.choice(
        [
            name,
            spec,
            {**spec, "init_args": {"layers": "0-1"}},
            {**spec, "dict_kwargs": {"command": "touch fired"}},
            json.dumps(spec),
            {"class_path": "IntermediateOnly", "init_args": {"layers": spec}},
        ]
    )


def _placed(draw: random.Random, place: str, form: Any) -> dict[str, Any]:
    """The options of the trainer or the module with a form at a place."""
    if place == "tuning":
        return {"model": {"tuning": form}}
    if place in ("callable", "deep"):
        when = draw.choice(["on_fit_start", "on_train_end", "setup"])
        inner = {"class_path": _LAMBDA, "init_args": {when: form}}
        wrapped = {"class_path": _LAMBDA, "init_args": {when: inner}}
        return {"trainer": {"callbacks": [wrapped if place == "deep" else inner]}}
    listed = place.startswith(("callbacks", "plugins")) or draw.random() < 0.2
    return {"trainer": {place: [form] if listed else form}}


def _sent(draw: random.Random, label: str, road: str, options: dict[str, Any]) -> HostileConfig:
    """The files and variables by which options arrive."""
    suffix = draw.choice(_SUFFIXES)
    if road == "environment":
        (section, content), *_ = options.items()
        (key, value), *_ = content.items()
        variable = f"PL_{section}__{key}".upper().rstrip("+")
        return HostileConfig(label, road, options, environment={variable: json.dumps(value)})
    if road == "sub-config":
        (section, content), *_ = options.items()
        (key, value), *_ = content.items()
        named = {section: {key: [f"sub{suffix}"] if isinstance(value, list) else f"sub{suffix}"}}
        inner = value[0] if isinstance(value, list) else value
        files = {f"main{suffix}.in": json.dumps(named), f"sub{suffix}": json.dumps(inner)}
        return HostileConfig(label, road, options, files)
    if road == "nested file":
        inner = {"allow": "hostile_canary,torch,posix,subprocess", **options}
        return HostileConfig(label, road, options, {f"main{suffix}": json.dumps(inner)})
    return HostileConfig(label, road, options, {f"main{suffix}": json.dumps(options)})
