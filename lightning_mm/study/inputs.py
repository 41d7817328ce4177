"""What every model of a study is asked: each test three ways (its pictures, other pictures, gray ones), facts, a text.

The rows are written to files once, so that all arms are asked exactly the same, through the data module that trains.
Another picture is one of the same test, drawn so that no picture stays (a derangement of the pictures, not of the rows:
questions of one picture stay together).

Data flow: question files -> rows with numbers for ids -> work/inputs/<test>.own.json, .other.json, .gray.json, and
questions.csv.gz (what each number stands for).
"""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json, write_atomically, write_json
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.image_source import image_file
from lightning_mm.data.images import load
from lightning_mm.data.sample import Sample, Turn
from lightning_mm.data.sample_encoder import gray_image
from lightning_mm.study.folder import StudyFolder, write_table
from lightning_mm.study.settings import PYTHON_PROSE, StudySettings

Shown = Literal["own", "other", "gray"]
"""Which picture a question is asked with."""
FACTS = "facts"
_COLUMNS = ("test", "question", "id", "picture", "type", "answer")
_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}


@dataclass(frozen=True)
class Asked:
    """One file of questions.

    Args:
        test: Name of the test; ``facts`` for the questions without pictures.
        shown: Which pictures its questions are asked with.
        file: The rows.
    """

    test: str
    shown: Shown
    file: Path


def question_files(folder: StudyFolder, settings: StudySettings, blind: bool = True) -> list[Asked]:
    """The files of questions that a model is asked.

    Args:
        folder: The study's folder, prepared.
        settings: The study.
        blind: Whether with other pictures and gray ones too.
    """
    ways: tuple[Shown, ...] = ("own", "other", "gray") if blind else ("own",)
    found = [Asked(test, way, folder.inputs / f"{test}.{way}.json") for test in settings.tests for way in ways]
    facts = [] if settings.facts is None else [Asked(FACTS, "own", folder.inputs / f"{FACTS}.own.json")]
    return [each for each in found if each.file.is_file()] + facts


def prepare_inputs(folder: StudyFolder, settings: StudySettings, data: MMDataModule) -> None:
    """Write all files of questions, and the text, unless they are there.

    Args:
        folder: The study's folder.
        settings: The study.
        data: How files are read: the options of the fit.

    Raises:
        UserError: A file has no question, or pictures that are no files.
    """
    done = folder.inputs / "done.json"
    if done.is_file() and folder.questions.is_file():
        return
    folder.inputs.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[object, ...]] = []
    named = {**settings.tests, **({} if settings.facts is None else {FACTS: settings.facts})}
    for test, file in named.items():
        samples = _samples(data, test, file)
        if test == FACTS:
            samples = [sample for sample in samples if not sample.has_images]
            if not samples:
                raise UserError(f"facts: {file} has no row without a picture.", "Facts are text only.", "Name another.")
        else:
            samples = _asked_samples(test, samples, settings.questions_per_type)
        pictures = _pictures(test, samples)
        rows += _listed(test, samples, pictures)
        _write_rows(folder.inputs / f"{test}.own.json", samples, {path: path for path in pictures})
        if test != FACTS:
            _write_blind(folder, test, _first_of_types(samples, settings.blind_per_type), pictures)
    write_table(folder.questions, _COLUMNS, rows)
    if settings.text is not None:
        write_atomically(folder.inputs / "text.txt", _text(settings.text))
    write_json(done, {"rows": len(rows)})


def _asked_samples(test: str, samples: Sequence[Sample], most: int | None) -> list[Sample]:
    """The rows of a test that are asked."""
    kept = [sample for _, sample in _first_of_types(samples, most)]
    if len(kept) < len(samples):
        why = f"of {len(samples)}: questions_per_type is {most}"
        log_decision(f"study.tests.{test}", f"asked in its first {len(kept)} rows by type", why)
    return kept


def _samples(data: MMDataModule, test: str, file: str) -> list[Sample]:
    source = MMDataModule(**{**data.arguments, "train": None, "val": None, "predict": None, "test": file})
    source.setup("test")
    found = list(source.samples("test"))
    if not found:
        raise UserError(f"{test}: {file} has no question.", "No row of it can be used.", "Name another file.")
    return found


def _pictures(test: str, samples: Sequence[Sample]) -> list[str]:
    """Paths of the pictures of a test, each once, in order of first use."""
    paths = []
    for sample in samples:
        if sample.videos or len(sample.images) > 1:
            raise UserError(
                f"{test}: {sample.origin} has several pictures, or a video.",
                "A question is asked again with another picture in place of its one.",
                "Give tests whose rows have one picture each, or none.",
            )
        paths += [str(image_file(image)) for image in sample.images]
    return list(dict.fromkeys(paths))


def _listed(test: str, samples: Sequence[Sample], pictures: Sequence[str]) -> list[tuple[object, ...]]:
    """A row of questions.csv.gz per question."""
    numbers = {path: number for number, path in enumerate(pictures)}
    found: list[tuple[object, ...]] = []
    for row, sample in enumerate(samples):
        picture = numbers[str(image_file(sample.images[0]))] if sample.images else f"row{row}"
        for index, turn in enumerate(sample.answers):
            said = sample.turns[turn]
            found.append((test, f"{row}.{index}", sample.id, picture, said.question_type, said.text))
    return found


def _write_rows(
    file: Path, samples: Sequence[Sample], pictures: Mapping[str, str], numbers: Sequence[int] | None = None
) -> None:
    """Write rows in LLaVA's form, with their numbers for ids and the given pictures in place of their own."""
    rows = []
    for number, sample in zip(numbers or range(len(samples)), samples, strict=True):
        talk: list[dict[str, Any]] = [
            {"from": _SPEAKERS[turn.role], "value": turn.text, **(_marks(turn) if turn.role == "assistant" else {})}
            for turn in sample.turns
            if turn.role in _SPEAKERS
        ]
        image = {"image": pictures[str(image_file(sample.images[0]))]} if sample.images else {}
        rows.append({"id": str(number), "conversations": talk, **image})
    write_json(file, rows)


def _marks(turn: Turn) -> dict[str, Any]:
    """Type of the question that an assistant's turn answers, and whether it is asked at all."""
    return {"type": turn.question_type, "train": turn.train}


def _first_of_types(samples: Sequence[Sample], most: int | None) -> list[tuple[int, Sample]]:
    """The first rows of every question type, with their numbers; None: all."""
    met: Counter[str] = Counter()
    kept = []
    for number, sample in enumerate(samples):
        kinds = {sample.turns[turn].question_type for turn in sample.answers}
        if most is None or any(met[kind] < most for kind in kinds):
            kept.append((number, sample))
            met.update(kinds)
    return kept


def _write_blind(folder: StudyFolder, test: str, kept: Sequence[tuple[int, Sample]], pictures: Sequence[str]) -> None:
    """The rows with other pictures, and with gray ones of the same size."""
    kept = [(number, sample) for number, sample in kept if sample.images]
    if len(pictures) < 2 or not kept:
        log_decision(f"study.tests.{test}", "asked with its own pictures only", "it has fewer than two pictures")
        return
    numbers, samples = zip(*kept, strict=True)
    _write_rows(folder.inputs / f"{test}.other.json", samples, deranged(pictures), numbers)
    grays = {}
    (folder.inputs / "gray").mkdir(exist_ok=True)
    for sample in samples:
        path = str(image_file(sample.images[0]))
        target = folder.inputs / "gray" / f"{test}-{pictures.index(path)}.png"
        if path not in grays:
            gray_image(_size(Path(path))).save(target)
        grays[path] = str(target.absolute())
    _write_rows(folder.inputs / f"{test}.gray.json", samples, grays, numbers)


def _size(path: Path) -> tuple[int, int]:
    found: Image.Image = load(path).image
    return found.size


def deranged(pictures: Sequence[str], seed: int = 0) -> dict[str, str]:
    """Every picture -> another one, each once.

    Example:
        >>> deranged(["a", "b"])
        {'a': 'b', 'b': 'a'}
    """
    order = list(pictures)
    random.Random(seed).shuffle(order)
    return dict(sorted(zip(order, [*order[1:], *order[:1]], strict=True)))


def _text(named: str) -> str:
    if named != PYTHON_PROSE:
        try:
            return Path(named).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"text: {named} cannot be read.", str(error), f"Name a text, or {PYTHON_PROSE}.") from error
    return python_prose()


def python_prose() -> str:
    """Prose of the documentation that comes with Python: long paragraphs without code."""
    from pydoc_data.topics import topics

    paragraphs = (re.sub(r"\s+", " ", part).strip() for name in sorted(topics) for part in topics[name].split("\n\n"))
    return " ".join(each for each in paragraphs if len(each) > 200 and not re.search(r"[`{}<>=|\[\]_*]", each))


def read_text(folder: StudyFolder) -> str:
    """The text whose likelihood is measured."""
    return (folder.inputs / "text.txt").read_text(encoding="utf-8")


def read_choices(folder: StudyFolder, test: str) -> dict[str, dict[str, int]] | None:
    """Question type -> answer -> its first token, of types with few answers; None: not made yet."""
    file = folder.inputs / f"{test}.choices.json"
    return read_json(file) if file.is_file() else None


def write_choices(folder: StudyFolder, test: str, choices: Mapping[str, Mapping[str, int]]) -> None:
    """Keep what ``read_choices`` returns."""
    write_json(folder.inputs / f"{test}.choices.json", choices)
