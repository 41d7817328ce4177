"""The files that a path means: a file, a pattern, a folder in a layout of ``datasets``, or a dataset of the hub.

Data flow: ``Source`` -> ``locate`` -> ``Located``: files of rows, in order, and the folder that their pictures are in.

A folder is, in this order: what ``save_to_disk`` wrote; one with a table of metadata beside pictures (imagefolder);
else files of rows, by the README's configurations or the names of splits, as ``datasets`` resolves them.
"""

import glob
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mm.core.errors import UserError
from lightning_mm.data.readers.formats import suffix_of
from lightning_mm.data.readers.hub import download_dataset
from lightning_mm.data.readers.source_spec import Source
from lightning_mm.data.readers.splits import choose_split

ROW_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".tar")
_NOT_ROWS = frozenset({
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "package.json",
    "croissant.json",
})  # fmt: skip
_METADATA = re.compile(r"metadata\.(jsonl|csv|parquet)")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Located:
    """Files of rows.

    Args:
        files: In order.
        root: Folder that names of pictures are relative to, unless the user names one.
        follow_links: Whether its pictures are links into the cache of the hub.
        pictures: For a table of metadata: pictures of the wanted split, relative to ``root``; None for all.
        is_imagefolder: Whether the files are tables of metadata.
    """

    files: tuple[Path, ...]
    root: Path
    follow_links: bool = False
    pictures: frozenset[str] | None = None
    is_imagefolder: bool = False


def locate(source: Source, option: str) -> Located:
    """The files of a source.

    Args:
        source: What the user named.
        option: What its rows are for: train, validation, test or predict.

    Raises:
        UserError: There is no such file, folder or dataset, or it is not clear which of its files are meant.
    """
    path = Path(source.path)
    if path.is_dir():
        return _folder(path.absolute(), source, option)
    if path.exists():
        return Located((path,), path.parent)
    if any(mark in source.path for mark in "*?[") and (found := _matching(source.path)):
        return Located(tuple(found), Path(os.path.commonpath([file.parent for file in found])))
    name = source.path.removeprefix("hf://datasets/")
    if _HUB_NAME.fullmatch(name) and (name != source.path or not path.parent.exists()):
        folder = download_dataset(name, source.revision)
        located = _folder(folder, source, option)
        return Located(located.files, located.root, True, located.pictures, located.is_imagefolder)
    if "://" in source.path:
        raise UserError(
            f"{source.path} is not read.",
            "It is an address, and only datasets of Hugging Face's hub are downloaded.",
            "Download it, and name the file; or name a dataset of the hub as org/name.",
        )
    if glob.has_magic(source.path) and glob.glob(source.path, recursive=True):
        raise UserError(
            f"No file matches {source.path}.", "Only folders do.", "Name one of the folders, or the files in them."
        )
    what = "No file matches" if glob.has_magic(source.path) else "No data file"
    raise UserError(
        f"{what} {source.path}.",
        "It does not exist.",
        "Check the path; it is relative to the folder the command runs in.",
    )


def _matching(pattern: str) -> list[Path]:
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    return [path for path in found if path.is_file()]


def _folder(folder: Path, source: Source, option: str) -> Located:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return _saved(folder / choose_split(str(folder), splits, option, source.split))
    if (folder / "state.json").is_file():
        return _saved(folder)
    files = _files(folder)
    patterns = _patterns(folder, source)
    if metadata := [file for file in files if _METADATA.fullmatch(file.name)]:
        return _imagefolder(folder, metadata, source, option)
    splits = _resolved(folder, patterns, [file for file in files if _is_of_rows(file)])
    if not splits:
        raise UserError(
            f"{folder} holds no file of rows.",
            f"It is a folder with {_endings(files)}; files of rows are {', '.join(ROW_SUFFIXES)}.",
            "Name the file that is meant.",
        )
    unnamed = len(splits) == 1 and not patterns and source.split is None and _split_patterns(folder) == _ALL
    split = next(iter(splits)) if unnamed else choose_split(str(folder), splits, option, source.split)
    found = splits[split]
    kinds = Counter(suffix_of(file) for file in found)
    if len(kinds) > 1:
        raise UserError(
            f"{folder} holds files of several kinds.",
            f"{_endings(found)} of the split {split}.",
            f"Name those that are meant, such as {folder}/*{kinds.most_common(1)[0][0]}.",
        )
    return Located(tuple(found), folder)


def _saved(folder: Path) -> Located:
    """The Arrow files of a dataset that ``save_to_disk`` wrote."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = tuple(folder / each["filename"] for each in state["_data_files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not whole.",
            f"save_to_disk writes state.json with its files: {error!r:.200}.",
            "Save it again.",
        ) from error
    if gone := next((file for file in files if not file.is_file() or ".." in file.parts), None):
        raise UserError(f"{folder} is not whole.", f"{gone.name} is missing.", "Copy the folder again.")
    return Located(files, folder)


def _files(folder: Path) -> list[Path]:
    """Every file below a folder, without hidden ones, in order."""
    made = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        made += [Path(parent) / name for name in sorted(names) if not name.startswith(".")]
    return made


def _is_of_rows(file: Path) -> bool:
    return suffix_of(file) in ROW_SUFFIXES and file.name not in _NOT_ROWS


def _patterns(folder: Path, source: Source) -> dict[str, list[str]]:
    """Split -> patterns of its files, as the README's configuration says; {} if it says nothing.

    Raises:
        UserError: There are several configurations, and none is named; or the one named is not there.
    """
    from datasets import data_files as hf_files  # only folders need it, and importing it takes a second
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    readme = folder / "README.md"
    configs: dict[str, Any] = {}
    if readme.is_file():
        try:
            configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme).data)
        except (ValueError, TypeError, KeyError, OSError):  # a README without, or with other, YAML
            configs = {}
    configs = {name: config for name, config in configs.items() if config.get("data_files")}
    if source.subset is not None and source.subset not in configs:
        raise UserError(
            f"{source.path} has no subset {source.subset!r}.",
            f"Its README names {', '.join(configs) or 'none'}.",
            "Name one of these as subset." if configs else "Leave subset out.",
        )
    if not configs:
        return {}
    default = configs.get("default") or next((each for each in configs.values() if each.get("default")), None)
    config = configs[source.subset] if source.subset else next(iter(configs.values())) if len(configs) == 1 else default
    if config is None:
        raise UserError(
            f"{source.path} has several subsets.", f"Its README names {', '.join(configs)}.", "Name one as subset."
        )
    patterns = hf_files.sanitize_patterns(config["data_files"])
    wrong = [
        each
        for given in patterns.values()
        for each in given
        if "://" in each or Path(each).is_absolute() or ".." in each
    ]
    if wrong:
        raise UserError(f"{readme} names files outside of its folder.", f"{wrong[0]!r}.", "Name the files themselves.")
    return {str(split): [str(each) for each in given] for split, given in patterns.items()}


def _resolved(folder: Path, patterns: dict[str, list[str]], files: list[Path]) -> dict[str, list[Path]]:
    """Split -> its files, among these."""
    if not files:
        return {}
    found = patterns or _split_patterns(folder)
    wanted = {os.path.normpath(file): file for file in files}
    splits: dict[str, list[Path]] = {}
    for split, given in found.items():
        names = [name for pattern in given for name in _resolve(pattern, folder)]
        if matched := [wanted[name] for name in dict.fromkeys(map(os.path.normpath, names)) if name in wanted]:
            splits[str(split)] = matched
    return {"train": files} if found == _ALL and not splits else splits


def _resolve(pattern: str, folder: Path) -> list[str]:
    from datasets.data_files import resolve_pattern

    try:
        return resolve_pattern(pattern, str(folder))
    except FileNotFoundError:
        return []


_ALL = {"train": ["**"]}


def _split_patterns(folder: Path) -> dict[str, list[str]]:
    """Split -> patterns of its files, by the names of files and folders; ``_ALL`` if no name is that of a split."""
    from datasets.data_files import EmptyDatasetError, get_data_patterns

    try:
        return {str(split): list(given) for split, given in get_data_patterns(str(folder)).items()}
    except (FileNotFoundError, EmptyDatasetError):
        return _ALL


def _endings(files: list[Path]) -> str:
    counts = Counter(file.suffix.lower() or file.name for file in files)
    return ", ".join(f"{count} x {ending}" for ending, count in counts.most_common(5)) or "nothing in it"


def _imagefolder(folder: Path, metadata: list[Path], source: Source, option: str) -> Located:
    """Tables of metadata beside pictures, as ``datasets`` reads them."""
    found = _split_patterns(folder)
    if found == _ALL and source.split is None:
        return Located(tuple(metadata), folder, is_imagefolder=True)
    split = choose_split(str(folder), found, option, source.split)
    names = [os.path.relpath(name, folder) for pattern in found[split] for name in _resolve(pattern, folder)]
    own = [file for file in metadata if os.path.relpath(file, folder) in names]
    if own:
        return Located(tuple(own), folder, is_imagefolder=True)
    return Located(tuple(metadata), folder, pictures=frozenset(names), is_imagefolder=True)
