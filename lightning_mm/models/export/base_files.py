"""The small files that an export takes over from its base model, byte by byte: tokenizer, processor, chat template.

Data flow: folder or hub name of the base -> ``find_base_files`` -> ``BaseFiles`` -> ``copy_processor`` -> the exported
folder. A processor that was changed since it was loaded is written anew, with the parts it was loaded without.

Weights, code and pickles are never taken over. Copies rather than ``save_pretrained``: that writes what was loaded, and
a processor may have been loaded without parts that training does not need.
"""

import inspect
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import ModelCard
from transformers import ProcessorMixin

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.models.processor import load_processor, save_processor

_MODEL_FILES = ("config.json", "generation_config.json", "README.md")

_READ = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.bpe", "*.vocab", "LICENSE*", "NOTICE*")
_LEFT = ("*.index.json", "adapter_config.json", "trainer_state.json", "training_args.json", "all_results.json",
         "train_results.json", "eval_results.json", "requirements*.txt", ".*")  # fmt: skip
_CODE = ("*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.so")
_LARGEST = 100 * 2**20
"""Bytes of the largest file that is taken over; vocabularies have up to some 40 MB."""

_CONFIGS: Mapping[str, tuple[str, ...]] = {
    "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
    "image_processor": ("preprocessor_config.json",),
    "video_processor": ("video_preprocessor_config.json", "preprocessor_config.json"),
    "feature_extractor": ("preprocessor_config.json",),
}
"""Files, besides processor_config.json, in which loaders look for the part of a processor."""


@dataclass(frozen=True)
class BaseFiles:
    """The small files of a base model.

    Args:
        base: Folder or hub name of the base model.
        revision: Revision of a hub model; None (default): the hub's default.
        files: Where each file is, by its name in the base's folder; empty if they are not at hand.
        model_files: Where the files that describe the model itself are, by name; an export writes its own.
        code: Names of files that hold code or pickles, which are left behind.
    """

    base: str
    revision: str | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    model_files: Mapping[str, Path] = field(default_factory=dict)
    code: tuple[str, ...] = ()

    @property
    def license(self) -> str | None:
        """The license that the base's model card states; None if there is no card, or it states none."""
        if (path := self.model_files.get("README.md")) is None:
            return None
        try:
            stated = ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
        except (OSError, ValueError, yaml.YAMLError):
            return None
        return stated if isinstance(stated, str) else None

    def copy(self, names: Iterable[str], folder: Path) -> None:
        """Copy files into a folder, under their names."""
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.files[name], folder / name)


def find_base_files(base: str, revision: str | None = None) -> BaseFiles:
    """The small files of a base model, from its folder, the hub's cache or the hub.

    Args:
        base: Folder or hub name; neither has to exist any more.
        revision: Commit, tag or branch of a hub model; None (default): the hub's default.
    """
    folder = Path(base) if Path(base).is_dir() else _hub_folder(base, revision)
    if folder is None:
        return BaseFiles(base, revision)
    found = {path.relative_to(folder).as_posix(): path for path in sorted(_small_files(folder))}
    code = sorted(path.name for pattern in _CODE for path in folder.glob(pattern))
    own = {name: folder / name for name in _MODEL_FILES if (folder / name).is_file()}
    return BaseFiles(base, revision, found, own, tuple(code))


def _hub_folder(base: str, revision: str | None) -> Path | None:
    """The snapshot of a hub model, with its small files fetched if the hub can be reached; None if there is none."""
    if "/" not in base or base.startswith((".", "/", "~")):  # a name without owner, or the path of a lost folder
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                base, revision=revision, allow_patterns=[*_READ, "README.md"], ignore_patterns=list(_LEFT)
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        log_decision("export.files", "not taken from the base", f"{base}: {str(error).strip().splitlines()[0]}")
        return None


def _small_files(folder: Path) -> Iterable[Path]:
    inner = [f"{sub.name}/{pattern}" for sub in _inner_folders(folder) for pattern in _READ]
    for pattern in (*_READ, *inner):
        for path in folder.glob(pattern):
            unwanted = any(path.match(left) for left in _LEFT) or path.name in _MODEL_FILES
            if path.is_file() and not unwanted and path.stat().st_size <= _LARGEST:
                yield path


def _inner_folders(folder: Path) -> list[Path]:
    """Sub-folders of a model that loaders read: further chat templates, further tokenizers."""
    templates = ("chat_templates", "additional_chat_templates")
    inner = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return [path for path in inner if path.name in templates or (path / "tokenizer_config.json").is_file()]


def copy_processor(processor: ProcessorMixin, base: BaseFiles, folder: Path) -> None:
    """Give a folder all files of the processor: the base's own, or anew if the processor differs from the base's.

    Args:
        processor: The live model's processor (transformers).
        base: Small files of the base model.
        folder: The folder that is being exported.
    """
    if not base.files:
        save_processor(processor, folder)
        log_decision("export.processor", "written anew", f"the files of {base.base} are not at hand")
    elif changed := _changes(processor, base):
        # Others beside a new tokenizer and processor would contradict them in programs that read the older names.
        base.copy([name for name in base.files if name.startswith(("LICENSE", "NOTICE"))], folder)
        save_processor(processor, folder)
        _restore_parts(processor, base, folder)
        log_decision("export.processor", "written anew", f"{changed} was changed since it was loaded")
    else:
        base.copy(base.files, folder)
        log_decision("export.processor", f"{len(base.files)} files of the base, as they are", ", ".join(base.files))
    if base.code:
        log_decision("export.code", f"{len(base.code)} files left behind", f"code or pickles, such as {base.code[0]}")
    if missing := missing_parts(processor, folder):
        log_decision(
            "export.processor", f"no config of {', '.join(missing)}", "the base has none; AutoProcessor may refuse both"
        )


def _changes(processor: ProcessorMixin, base: BaseFiles) -> str:
    """The first file that this processor and the base's would be written to differently; empty if none."""
    try:
        other = load_processor(base.base, base.revision).processor
    except UserError as error:
        return f"the base's processor cannot be loaded ({error.why}); the live one"
    with TemporaryDirectory() as scratch:
        live, loaded = (_written(each, Path(scratch) / name) for name, each in (("live", processor), ("base", other)))
    return next((name for name in sorted(live.keys() | loaded.keys()) if live.get(name) != loaded.get(name)), "")


def _written(processor: ProcessorMixin, folder: Path) -> dict[str, Any]:
    """What a processor writes, by file, without the padding and truncation of its tokenizer's last call."""
    save_processor(processor, folder)
    written: dict[str, Any] = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "tokenizer.json" in written:
        content = json.loads(written["tokenizer.json"])
        written["tokenizer.json"] = {k: v for k, v in content.items() if k not in ("padding", "truncation")}
    return written


def _restore_parts(processor: ProcessorMixin, base: BaseFiles, folder: Path) -> None:
    """Add to a newly written processor_config.json the parts that the base has and the live processor lacks."""
    target = folder / "processor_config.json"
    config = json.loads(target.read_text(encoding="utf-8"))
    for part in processor_parts(processor):
        known = _part_config(part, lambda name: base.files.get(name))
        if part in _CONFIGS and not hasattr(processor, part) and part not in config and known is not None:
            config[part] = known
    target.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _part_config(part: str, find: Any) -> dict[str, Any] | None:
    path = find("processor_config.json")
    if path is not None and isinstance(found := json.loads(path.read_text(encoding="utf-8")).get(part), dict):
        return found
    for name in _CONFIGS.get(part, ()):
        if (path := find(name)) is not None:
            loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return loaded
    return None


def processor_parts(processor: ProcessorMixin) -> tuple[str, ...]:
    """The parts of a processor's class, such as tokenizer and image_processor; also those it was loaded without."""
    names = inspect.signature(type(processor).__init__).parameters
    return tuple(name for name in names if name in _CONFIGS)


def missing_parts(processor: ProcessorMixin, folder: Path) -> tuple[str, ...]:
    """Parts of a processor whose config a folder lacks, so that ``AutoProcessor`` would refuse it.

    Args:
        processor: A processor of the class that the folder is for.
        folder: An exported folder.
    """

    def find(name: str) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    return tuple(part for part in processor_parts(processor) if _part_config(part, find) is None)
