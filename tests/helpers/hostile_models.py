"""Model folders that try to run code, or to take all memory or time: one change to a good folder each.

Data flow: seed -> kind of change x value -> ``HostileModel`` -> ``spoil``: the change is made to a copy of the folder.
"""

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KERNEL = "nobody/hostile-kernel"
_HUGE = (10**6 + 1, 10**9, 2**40, 2**63, 10**400)
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
_TYPES: tuple[Any, ...] = ("many", [], {}, -1, 0, 1.5, True, None, [[1]], "9" * 5000)
_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
_LATE = "{% if messages|length > 2 %}LOOP{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
TEMPLATES = (
    _LOOP.replace("BODY", ""),
    _LOOP.replace("BODY", "text of the template"),
    _LATE.replace("LOOP", _LOOP.replace("BODY", "")),
    "{{ 'a' * 20000000000 }}",
    "{{ 'a' * 100000000 }}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 3|round(1000000000, 'floor') }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ lipsum(n=100000000) }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{{ cycler.__init__.__globals__.os.system('touch fired') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ 1 / 0 }}",
)
"""Chat templates that do not end, take gigabytes, or reach for Python."""
FILES = ("fifo", "device", "long header", "short file", "no header", "deep", "far index", "large config", "adapter")
KINDS = ("size", "type", "kernel", "quantization", "template", *FILES, "tokenizer", "processor", "own code")


@dataclass(frozen=True)
class HostileModel:
    """One change.

    Args:
        label: What it is, for messages.
        kind: One of ``KINDS``.
        key: Entry of config.json, or name of a file.
        value: What it becomes.
        refused: Whether it must be refused; otherwise it may also be without effect.
    """

    label: str
    kind: str
    key: str = ""
    value: Any = None
    refused: bool = True


def hostile_models(seed: int, count: int) -> Iterator[HostileModel]:
    """Changes, the same ones for the same seed; every kind comes before any comes again."""
    draw = random.Random(seed)
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        key, value, refused = _drawn(draw, kind)
        yield HostileModel(
            f"{seed}:{index} {kind} {key} {str(value)[:40] if kind != 'size' else ''}", kind, key, value, refused
        )


def _drawn(draw: random.Random, kind: str) -> tuple[str, Any, bool]:
    part = draw.choice(["text_config.", "vision_config."])
    if kind == "size":
        return (
            part + draw.choice([size for size in _SIZES if part[0] == "t" or size != "vocab_size"]),
            draw.choice(_HUGE),
            True,
        )
    if kind == "type":
        return (
            draw.choice(["", part]) + draw.choice([*_SIZES, "model_type", "rope_parameters"]),
            draw.choice(_TYPES),
            False,
        )
    if kind == "kernel":
        name = draw.choice(["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
        form = draw.choice([_KERNEL, f"{_KERNEL}:run", f"{_KERNEL}@v1", {"text_config": _KERNEL}, f"paged|{_KERNEL}"])
        return draw.choice(["", part]) + name, form, True
    if kind == "quantization":
        return "quantization_config", {"quant_method": draw.choice(["mxfp4", "fp8", "metal"])}, True
    if kind == "template":
        return "chat_template.jinja", draw.choice(TEMPLATES), True
    if kind == "own code":
        return (
            "auto_map",
            {"AutoConfig": "hostile_code.Config", "AutoModelForImageTextToText": "hostile_code.Model"},
            False,
        )
    return "", None, True


def spoil(folder: Path, change: HostileModel) -> None:
    """Make a change to a folder, in which every file may be written."""
    weights = folder / "model.safetensors"
    changes: dict[str, Callable[[], Any]] = {
        "template": lambda: (folder / "chat_template.jinja").write_text(change.value),
        "fifo": lambda: os.mkfifo(folder / "generation_config.json.fifo"),
        "device": lambda: _replace(folder / "preprocessor_config.json", lambda file: file.symlink_to("/dev/zero")),
        "long header": lambda: _bomb(weights, 2**26),
        "short file": lambda: weights.write_bytes(b"\0" * 5),
        "no header": lambda: weights.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "deep": lambda: (folder / "config.json").write_text("[" * 200_000),
        "far index": lambda: _far_index(folder),
        "large config": lambda: _bomb(folder / "config.json", 2**25),
        "adapter": lambda: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "nobody/other"}'),
        "tokenizer": lambda: (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}'),
        "processor": lambda: (folder / "processor_config.json").write_text('{"processor_class": "os.system"'),
    }
    if change.kind in changes:
        changes[change.kind]()
    else:
        (folder / "hostile_code.py").write_text("from pathlib import Path\nPath('fired').touch()\n")
        _edit(folder / "config.json", change.key, change.value)


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    file.unlink(missing_ok=True)
    write(file)


def _bomb(file: Path, size: int) -> None:
    """A file of zeros that says it is all header, and takes no room on the disk."""
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", size - 8))
        opened.truncate(size)


def _far_index(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _edit(file: Path, key: str, value: Any) -> None:
    config = json.loads(file.read_text())
    inner = config
    *parts, last = key.split(".")
    for part in parts:
        inner = inner[part]
    inner[last] = value
    file.write_text(json.dumps(config))
