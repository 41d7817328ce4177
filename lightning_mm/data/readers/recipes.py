"""Files that list sources, as other trainers write them.

    LLaMA-Factory   dataset_info.json: {name: {"file_name": ..., "formatting": ..., "columns": {...}, "tags": {...}}};
                    ``dataset_info.json#name`` or ``#name,other`` takes some of its entries
    InternVL        meta.json: {name: {"root": ..., "annotation": ..., "repeat_time": ..., "data_augment": ...}}
    LLaVA-OneVision YAML: datasets: [{json_path: ..., sampling_strategy: "first:1000"}]
    ours            YAML or JSON: a list of sources, or {name: source}

Data flow: path -> ``sources_of_file`` -> sources with absolute paths, or None where the file lists none.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.readers.source_spec import COLUMNS, TAGS

_MAX_BYTES = 10_000_000


def sources_of_file(given: str) -> list[dict[str, Any]] | None:
    """The sources that a file lists, as fields of ``Source``; None if it is no such file.

    Args:
        given: Path of a file, with ``#name`` for one of LLaMA-Factory's entries.

    Raises:
        UserError: It is such a file, but an entry cannot be used.
    """
    path, names = Path(given), ""
    if not path.exists() and "#" in given:
        stem, _, names = given.rpartition("#")
        path = Path(stem)
    if path.suffix.lower() not in (".json", ".yaml", ".yml") or not path.is_file():
        return None
    content = _content(path)
    if path.suffix.lower() != ".json":
        return _of_yaml(path, content)
    if not isinstance(content, dict) or not content or not all(isinstance(each, dict) for each in content.values()):
        return None
    if all({"root", "annotation"} <= set(each) for each in content.values()):
        return [_of_internvl(path, name, entry) for name, entry in content.items()]
    if all(set(each) & set(_LOCATIONS) and set(each) <= _ENTRY for each in content.values()):
        return _of_llama_factory(path, content, [name for name in names.split(",") if name])
    return None


def _content(path: Path) -> Any:
    """The value of a JSON or YAML file; None if it is none, or too large to list sources."""
    if path.stat().st_size > _MAX_BYTES:
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError):
        return None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML.", f"{error}", "Mend it there.") from error


def _beside(path: Path, name: str) -> str:
    """A path of an entry: relative to the file that names it, or else to the current folder."""
    beside = path.parent / name
    return str(beside.absolute() if beside.exists() or not Path(name).exists() else Path(name).absolute())


def _of_internvl(path: Path, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    unread = {key: value for key, value in entry.items() if key not in ("root", "annotation", "repeat_time", "length")}
    if unread:
        log_decision(f"data.source.{name}", f"{', '.join(unread)} not applied", f"settings of InternVL in {path.name}")
    repeats = entry.get("repeat_time", 1)
    if not isinstance(repeats, (int, float)) or isinstance(repeats, bool) or repeats <= 0:
        raise UserError(f"{path}: repeat_time of {name} is {repeats!r}.", "It is above 0.", "Mend it there.")
    root = _beside(path, str(entry["root"])) if entry["root"] else str(path.parent.absolute())
    used = {"repeats": float(repeats)} if repeats >= 1 else {"sampling": f"first:{repeats}"}
    return {"path": _beside(path, str(entry["annotation"])), "name": name, "image_root": root, **used}


_LOCATIONS = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_ENTRY = {
    *_LOCATIONS,
    "formatting",
    "ranking",
    "subset",
    "split",
    "folder",
    "num_samples",
    "columns",
    "tags",
    "file_sha1",
}


def _of_llama_factory(path: Path, content: Mapping[str, Any], names: list[str]) -> list[dict[str, Any]]:
    if wrong := next((name for name in names if name not in content), None):
        raise UserError(f"{path} has no entry {wrong!r}.", f"It has {', '.join(content)}.", "Name one of these.")
    return [_llama_factory_entry(path, name, content[name]) for name in names or content]


def _llama_factory_entry(path: Path, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    def refuse(why: str, fix: str) -> UserError:
        return UserError(f"{path.name}: the entry {name!r} cannot be used.", why, fix)

    others = f"Name the entries that are meant, as {path}#NAME."
    if entry.get("ranking"):
        raise refuse("Its rows compare answers, and supervised fine-tuning has no use for a rejected answer.", others)
    if (entry.get("columns") or {}).get("kto_tag"):
        raise refuse(
            "Its rows say which answers are wanted (KTO), which supervised fine-tuning has no use for.", others
        )
    if (entry.get("columns") or {}).get("audios"):
        raise refuse("It has audio, which is not trained on.", others)
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise refuse(f"Its formatting is {formatting!r}.", "It is alpaca, sharegpt or openai.")
    if entry.get("hf_hub_url"):
        place, root = str(entry["hf_hub_url"]), None
    elif entry.get("file_name"):
        place, root = str((path.parent / str(entry["file_name"])).absolute()), str(path.parent.absolute())
    else:
        where = next(key for key in _LOCATIONS if key in entry)
        raise refuse(f"Its data is given by {where}; only file_name and hf_hub_url are read.", others)
    if entry.get("folder"):
        raise refuse("folder is not read.", "Download it, and name its files as file_name.")
    columns = {key: value for key, value in (entry.get("columns") or {}).items() if value and key in COLUMNS}
    tags = {key: value for key, value in (entry.get("tags") or {}).items() if value and key in TAGS}
    return {
        "path": place, "name": name, "image_root": root, "columns": columns, "tags": tags,
        "split": entry.get("split") if entry.get("hf_hub_url") else None, "subset": entry.get("subset"),
        "limit": entry.get("num_samples"),
    }  # fmt: skip


def _of_yaml(path: Path, content: Any) -> list[dict[str, Any]]:
    entries = content.get("datasets", content.get("sources")) if isinstance(content, dict) else content
    if (
        isinstance(content, dict)
        and entries is None
        and content
        and all(isinstance(each, dict) for each in content.values())
    ):
        entries = [{"name": name, **entry} for name, entry in content.items()]
    if not isinstance(entries, list) or not entries or not all(isinstance(each, (dict, str)) for each in entries):
        raise UserError(
            f"{path} lists no sources.",
            "A YAML file of data holds 'datasets: [{json_path: FILE, sampling_strategy: all}, ...]', or a list of "
            "sources with path.",
            "Write it so, or name the file with the rows.",
        )
    return [
        found for entry in entries for found in _yaml_entry(path, {"path": entry} if isinstance(entry, str) else entry)
    ]


def _yaml_entry(path: Path, entry: dict[str, Any]) -> list[dict[str, Any]]:
    if "json_path" not in entry:
        if "path" not in entry:
            raise UserError(f"{path}: an entry has no path: {entry!r:.200}.", "path names its data.", "Give it a path.")
        return [{**entry, "path": _beside(path, str(entry["path"]))}]
    strategy = str(entry.get("sampling_strategy", "all"))
    taken = {} if strategy == "all" else {"sampling": strategy}
    unread = [key for key in entry if key not in ("json_path", "sampling_strategy")]
    if unread:
        log_decision(
            f"data.source.{Path(entry['json_path']).stem}", f"{', '.join(unread)} not applied", f"in {path.name}"
        )
    return [{"path": _beside(path, name), **taken} for name in _braces(str(entry["json_path"]))]


def _braces(name: str) -> list[str]:
    """Names of a pattern with alternatives, ``{a,b}.json``, as LLaVA-NeXT writes them."""
    match = re.search(r"\{([^{}]*)\}", name)
    return (
        [name[: match.start()] + each.strip() + name[match.end() :] for each in match[1].split(",")]
        if match
        else [name]
    )
