"""What the files of a model must be before anything is built of them: a folder from elsewhere is hostile input.

Data flow: folder -> ``check_files`` (kinds of files, their sizes, headers of weights); config as written ->
``check_config`` (code from a hub, absurd sizes, by arithmetic alone) -> ``UserError``, one line each.
"""

import json
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_mm.core.errors import UserError

_MIB = 2**20
_WEIGHTS = ".safetensors"
_MOST_BYTES = {".json": 64 * _MIB, ".jinja": _MIB, ".txt": 256 * _MIB}
_TOKENIZER_BYTES = 512 * _MIB
_CONFIG_BYTES = 16 * _MIB
_HEADER_BYTES = 32 * _MIB
"""Of the JSON before the tensors; a shard of 100,000 tensors has 10 MiB."""
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "depths", "encoder_layers")
_WIDTH = ("hidden_size", "embed_dim", "d_model", "n_embd", "width")
_MOST = {
    **dict.fromkeys(_LAYERS, 1_000),
    **dict.fromkeys((*_WIDTH, "intermediate_size", "moe_intermediate_size", "head_dim"), 2**20),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads", "num_experts"), 2**14),
    **dict.fromkeys(("n_routed_experts", "num_local_experts"), 2**14),
    **dict.fromkeys(("image_size", "patch_size", "height", "width"), 2**15),
    "vocab_size": 2**24,
    "max_position_embeddings": 2**32,
}
"""Largest values, each about ten times that of any model there is."""
_MOST_ELEMENTS = 10**13
_SPARE_ELEMENTS = 2**28
"""Elements that a model may have beyond its files: 1 GiB, that tables which are not in them take in float32."""
_ELEMENTS_PER_BYTE = 8
_MEMORY_TIMES = 4
"""A model whose weights are quantized while they are loaded takes a fourth of its files."""
_KERNELS = re.compile(r"_?(attn|attention|experts)_implementation(_internal)?")
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "grouped_mm", "batched_mm")
_FETCHING = ("fp8", "mxfp8", "mxfp4", "nvfp4", "metal", "eetq", "fbgemm_fp8")
"""Quantizations that transformers computes by kernels from a hub."""
_WRITTEN = "Use a folder that save_pretrained wrote, from somebody you trust."


def check_files(folder: Path) -> None:
    """Refuse a folder whose files would take all memory or time before they are seen to be wrong.

    Args:
        folder: Folder of a model; the names and first bytes of its files are read.

    Raises:
        UserError: It names the file.
    """
    for file in sorted(folder.iterdir()):
        if file.is_dir():
            continue
        found = file.stat() if file.exists() else None
        if found is None or not stat.S_ISREG(found.st_mode):
            raise _refused(folder, f"{file.name} is no regular file.")
        most = _CONFIG_BYTES if file.name == "config.json" else _MOST_BYTES.get(file.suffix)
        most = _TOKENIZER_BYTES if file.name in ("tokenizer.json", "vocab.json") else most
        if most is not None and found.st_size > most:
            raise _refused(folder, f"{file.name} has {found.st_size / _MIB:,.0f} MiB, more than {most // _MIB}.")
        if file.suffix == _WEIGHTS:
            _check_header(folder, file, found.st_size)
        elif file.name.endswith(f"{_WEIGHTS}.index.json"):
            _check_index(folder, file)
    if (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():
        raise UserError(
            f"model.backbone.path: {folder} holds an adapter beside a model.",
            "Its adapter_config.json names another model, which would be loaded in place of this one.",
            "Merge the adapter, or move adapter_config.json away.",
        )


def check_memory(folder: Path) -> None:
    """Refuse weights that no way of loading can hold on this machine. Raises UserError."""
    held, memory = _weight_bytes(folder), _memory()
    if memory and held > _MEMORY_TIMES * memory:
        why = f"Its weights have {held / 2**30:,.0f} GiB; this machine has {memory / 2**30:,.0f} GiB of memory."
        raise _refused(folder, why)


def check_config(path: str, config: Mapping[str, Any]) -> None:
    """Refuse a config that names code of a hub, or sizes that no model has.

    Args:
        path: Folder or hub name of the model; what a folder holds bounds what its config may say.
        config: ``config.json`` as it is written.

    Raises:
        UserError: It names the entry.
    """
    for key, name, value in _entries(config):
        if isinstance(value, str) and value not in _ATTENTION and any(map(_KERNELS.fullmatch, key.split("."))):
            raise _foreign_code(
                path, f"config.json: {key} is {value[:80]!r}, which would be fetched from a hub and run."
            )
        if value and {"kernel_config", "use_kernels"} & set(key.split(".")):
            raise _foreign_code(
                path, f"config.json: {key} asks for kernels, which would be fetched from a hub and run."
            )
        if name == "quant_method" and value in _FETCHING:
            raise _foreign_code(path, f"config.json: {key} is {value!r}, whose kernels would be fetched from a hub.")
        if any(abs(each) > _MOST.get(name, 2**53) for each in _integers(value)):
            raise _refused(
                path, f"config.json: {key} is {_shown(value)}; no model has more than {_MOST.get(name, 2**53):,}."
            )
        if name in _MOST and any(each < 0 for each in _integers(value)) and name != "max_position_embeddings":
            raise _refused(path, f"config.json: {key} is {_shown(value)}.")
    elements = sum(map(_least_elements, _mappings(config)))
    most = _MOST_ELEMENTS
    if Path(path).is_dir() and (held := _weight_bytes(Path(path))):  # one without weights can be planned
        most = _ELEMENTS_PER_BYTE * held + _SPARE_ELEMENTS
    if elements > most:
        raise _refused(
            path, f"config.json is of a model with {elements:,} weights or more; its files can hold {most:,} at most."
        )


def _check_header(folder: Path, file: Path, size: int) -> None:
    """Refuse weights whose header cannot be read in a moment; what it says is checked by safetensors."""
    with file.open("rb") as opened:
        first = opened.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 2 <= length <= min(size - 8, _HEADER_BYTES):
        raise _refused(folder, f"{file.name} has a header of {length:,} bytes in a file of {size:,}.")


def _check_index(folder: Path, file: Path) -> None:
    """Refuse an index of shards that leads out of the folder."""
    try:
        names = set(json.loads(file.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _refused(folder, f"{file.name} is no index of shards.") from error
    stray = next((name for name in names if not isinstance(name, str) or Path(name).name != name), None)
    if stray is not None:
        raise _refused(folder, f"{file.name} names {str(stray)[:80]!r}, which is no file of the folder.")


def _entries(value: Any, key: str = "", name: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted key, last name, value) of everything in nested mappings and lists."""
    if isinstance(value, Mapping):
        for each, inner in value.items():
            yield from _entries(inner, f"{key}.{each}" if key else str(each), str(each))
    elif isinstance(value, list) and any(isinstance(each, (Mapping, list)) for each in value):
        for inner in value:
            yield from _entries(inner, key, name)
    else:
        yield key, name, value


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """A mapping and all mappings within it."""
    if isinstance(value, Mapping):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _mappings(inner)


def _least_elements(config: Mapping[str, Any]) -> int:
    """Weights that a part of a model cannot do without: embeddings, one matrix per layer, one position per patch."""

    def largest(*names: str) -> int:
        return max((each for name in names for each in _integers(config.get(name))), default=0)

    width, layers = largest(*_WIDTH), largest(*_LAYERS)
    patches = largest("image_size") // largest("patch_size") if largest("patch_size") > 0 else 0
    per_layer = width * largest("intermediate_size")
    experts = largest("num_experts", "n_routed_experts", "num_local_experts")
    return width * largest("vocab_size") + layers * per_layer + experts * width + patches**2 * width


def _integers(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, int) and not isinstance(each, bool)]


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob(f"*{_WEIGHTS}"))


def _memory() -> int:
    """Bytes of this machine's memory; 0 where the system does not say."""
    names = getattr(os, "sysconf_names", {})
    known = "SC_PAGE_SIZE" in names and "SC_PHYS_PAGES" in names
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else 0


def _shown(value: Any) -> str:
    """A value in few words; a number of a million digits cannot be printed."""
    values = _integers(value)
    return ", ".join(f"{each:,}" if abs(each) < 10**18 else "above 10^18" for each in values[:4])


def _foreign_code(path: str, why: str) -> UserError:
    return UserError(f"model.backbone.path: {path} asks for code.", why, "Remove the entry from its config.json.")


def _refused(path: str | Path, why: str) -> UserError:
    return UserError(f"model.backbone.path: {path} cannot be loaded.", why, _WRITTEN)
