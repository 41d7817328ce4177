"""What a study compares: its arms, seeds, tests and measures, as one YAML says it.

Data flow: YAML or a dict -> jsonargparse -> ``StudySettings`` (checked) -> ``jobs``; written to study.json, which a
later sitting is compared with.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from lightning_mm.core.errors import UserError
from lightning_mm.verbs.config_classes import judged_names
from lightning_mm.verbs.rows import PathLike

START = "stage1"
"""What the model is called that every arm begins from."""
PYTHON_PROSE = "python"
"""Name of the text that comes with Python: the prose of its own documentation (``pydoc_data.topics``)."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_RESERVED = (START, "work")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Args:
        tuning: Name of a tuning policy, such as IntermediateOnly.
        options: Its options; {seed} in a text is replaced by the seed. ``layers: auto`` is written out by reading the
            model that all arms begin from.
        lr: Learning rate of all that trains beside the connector; None: the study's.
        train_connector: Whether the connector trains too, at the study's rate for it.
    """

    tuning: str
    options: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    train_connector: bool = True


def default_arms() -> dict[str, Arm]:
    """The middle, its control, its rivals of equal budget, and everything."""
    middle = {"layers": "25%-50%"}
    return {
        "connector": Arm(tuning="ConnectorOnly"),
        "middle": Arm(tuning="IntermediateOnly", options=middle),
        "early": Arm(tuning="EarlyLayers", options={"budget": "25%-50%"}),
        "late": Arm(tuning="LateLayers", options={"budget": "25%-50%"}),
        "full": Arm(tuning="Full", lr=3e-4),
        "auto": Arm(tuning="IntermediateOnly", options={"layers": "auto"}),
        "uniform": Arm(tuning="UniformSparse", options={"budget": "25%-50%"}),
        "random": Arm(tuning="RandomLayers", options={"budget": "25%-50%", "seed": "{seed}"}),
        "lora": Arm(tuning="LoRAOnMiddle", options={**middle, "lora": {"r": 16, "alpha": 32}}),
    }


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one of the two stages adds to the options of both.

    Args:
        steps: Optimizer steps.
        configs: Config files of ``fit``, as ``-c`` takes them.
        options: Further options of ``fit`` by dotted name; they win over the files.
    """

    steps: int
    configs: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Which arm plays which part in the comparisons; an arm that the study does not have is left out of them.

    Args:
        main: The arm that the study is about.
        control: What the same steps give without it.
        full: The arm that trains everything.
        auto: The arm whose layers are chosen by reading the model.
        rivals: Arms of the budget of ``main``, elsewhere.
    """

    main: str = "middle"
    control: str = "connector"
    full: str = "full"
    auto: str = "auto"
    rivals: tuple[str, ...] = ("early", "late", "uniform", "random")


@dataclass(frozen=True, kw_only=True)
class LayerReading:
    """What is read of every layer.

    Args:
        probes: File of pictures with captions and objects; None: nothing is read of layers.
        images: Most pictures.
        measures: Geometry measures, as ``inspect`` knows them.
        neighbors: k of the neighborhood measures.
        arms: Arms that are read, beside the model that all begin from; None: all.
    """

    probes: str | None = None
    images: int = 96
    measures: tuple[str, ...] = ("overlap", "label_overlap", "gap", "gap_auc")
    neighbors: int = 10
    arms: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Causes:
    """What is found out of causes, in the model that all arms begin from and in the main arm.

    Args:
        questions: File of questions with constraints, as ``trace`` takes it; None: causes are left out.
        conversations: File of conversations that hybrids of both models are asked; None: nothing is transplanted.
        prompt: How a question is worded.
        ask: Most questions that are asked.
        limit: Most right answers that are looked into.
        batches: Batches of conversations.
        seeds: Seeds that it is done for.
        bf16: Whether forward passes run in bfloat16.
    """

    questions: str | None = None
    conversations: str | None = None
    prompt: str = "{question}"
    ask: int = 200
    limit: int = 24
    batches: int = 6
    seeds: tuple[int, ...] = (0,)
    bf16: bool = False


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """A study.

    Args:
        model: Model folder or hub name.
        stage1: What is done once per seed before the arms; None: they begin from ``model``.
        stage2: What every arm does.
        configs: Config files of ``fit`` for both stages; data and trainer belong here.
        options: Further options of ``fit`` for both stages by dotted name.
        arms: The arms by name, in the order they run.
        seeds: Of the order of the rows, and of random draws.
        tests: Question files by name, one row per question or conversation.
        questions_per_type: Most questions of a type that are asked of each test, the first in its file; None: all.
        facts: Questions without pictures that the language model knew before; None: none are asked.
        text: Text whose negative log-likelihood tells what is lost: a text file, or ``python``; None: not measured.
        text_chunks: Number of passages of it.
        text_tokens: Tokens of a passage.
        lr: Learning rate of what trains beside the connector.
        connector_lr: Learning rate of the connector.
        blind_per_type: Most questions of a type that are asked again with another picture and with a gray one; None:
            all.
        eval_batch_size: Questions (pictures, where ``data.share_images``) of a forward pass of the tests.
        layers: What is read of every layer.
        causes: What is found out of causes.
        roles: Which arm plays which part.
        save_every: Steps between writes of an arm's last.ckpt, from which it goes on.
        keep_checkpoints: Whether an arm's checkpoints are kept once it is measured.
        resamples: Bootstrap resamples of the report.
    """

    model: str
    stage2: Stage
    stage1: Stage | None = None
    configs: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, Arm] = field(default_factory=default_arms)
    seeds: tuple[int, ...] = (0, 1, 2)
    tests: dict[str, str] = field(default_factory=dict)
    questions_per_type: int | None = None
    facts: str | None = None
    text: str | None = PYTHON_PROSE
    text_chunks: int = 64
    text_tokens: int = 96
    lr: float = 5e-4
    connector_lr: float = 1.5e-3
    blind_per_type: int | None = 60
    eval_batch_size: int = 16
    layers: LayerReading = field(default_factory=LayerReading)
    causes: Causes = field(default_factory=Causes)
    roles: Roles = field(default_factory=Roles)
    save_every: int = 100
    keep_checkpoints: bool = False
    resamples: int = 2000

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds or not self.tests:
            lacking = [name for name in ("arms", "seeds", "tests") if not getattr(self, name)]
            raise UserError(
                "The study compares nothing.", f"It has no {' and no '.join(lacking)}.", "Name them in its file."
            )
        for name in (*self.arms, *self.tests):
            if not _NAME.fullmatch(name) or name in _RESERVED:
                raise UserError(
                    f"{name!r} cannot name an arm or a test of a study.",
                    f"Names are small letters, digits, - and _; {' and '.join(_RESERVED)} have a meaning.",
                    "Choose another name.",
                )
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds are {list(self.seeds)}.", "Each is 0 or more, and named once.", "Give [0, 1, 2].")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, as study.json holds it."""
        plain = _plain(asdict(self))
        assert isinstance(plain, dict)
        return plain


def read_settings(*given: "StudySettings | PathLike | Mapping[str, Any]") -> StudySettings:
    """The settings of a YAML file, or of the same as a dict; of several, later ones win option by option.

    Args:
        given: Files, their contents, or settings, which are returned as they are.

    Raises:
        UserError: There is no such file, or an option of it cannot be read.
    """
    if isinstance(given[-1], StudySettings):
        return given[-1]
    where = "The study" if isinstance(given[-1], Mapping) else str(given[-1])
    content: dict[str, Any] = {}
    for each in given:
        assert not isinstance(each, StudySettings), "settings are whole: nothing is added to them"
        content = _merged(content, each if isinstance(each, Mapping) else _load(Path(each)))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(StudySettings, "study")
    try:
        with judged_names():
            parsed: StudySettings = parser.instantiate_classes(parser.parse_object({"study": content})).study
    except ArgumentError as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
        raise UserError(f"{where} cannot be read.", " ".join(lines[-2:]), "See lightning-mm study --help.") from error
    if isinstance(parsed, StudySettings):
        return parsed
    return StudySettings(**vars(parsed))


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Both, with the new one's values where both have one; arms that the new one names replace those of that name."""
    both = {
        key: _merged(old[key], value) if isinstance(value, Mapping) and isinstance(old.get(key), Mapping) else value
        for key, value in new.items()
    }
    return {**old, **both}


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"There is no file {path}.", str(error), "Name the YAML of a study: -c FILE.yaml.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML.", " ".join(str(error).split()), "Mend it there.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} sets no options.", "It is no mapping of options to values.", "See docs/study.md.")
    return content


def _plain(value: object) -> object:
    """Tuples as lists, so that it equals what JSON gives back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The options whose values differ, as ``name: old, now new``.

    Example:
        >>> differences({"lr": 1, "arms": {"a": 1}}, {"lr": 2, "arms": {"a": 1}})
        ['lr: 1, now 2']
    """
    found = []
    for key in dict.fromkeys([*old, *new]):
        name, before, now = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += differences(before, now, f"{name}.")
        elif before != now:
            found.append(f"{name}: {before}, now {now}")
    return found
