"""The results of a study, read from its small files: scores as tensors, texts, costs, layers.

Data flow: study.json, questions.csv.gz, seed*/ARM/* -> ``StudyResults`` -> ``comparison``.

Shapes: A arms, S seeds, Q questions.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json
from lightning_mm.core.layer_table import LayerRow
from lightning_mm.study.folder import Job, StudyFolder, read_layers, read_table
from lightning_mm.study.inputs import Shown
from lightning_mm.study.measure import Moment
from lightning_mm.study.settings import START, StudySettings, read_settings


@dataclass(frozen=True)
class Questions:
    """The questions of a test.

    Args:
        ids: (Q,) ``row.answer``.
        pictures: (Q,) number of the picture of each; a question without one stands for itself.
        types: (Q,) question types.
        answers: (Q,) right answers.
    """

    ids: tuple[str, ...]
    pictures: Tensor
    types: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The question types, sorted."""
        return tuple(sorted(set(self.types)))

    def of_kind(self, kind: str | None) -> Tensor:
        """(Q,) whether each is of a type; None: of any."""
        return torch.tensor([kind is None or each == kind for each in self.types])

    def majority(self) -> Tensor:
        """(Q,) 1 where the most frequent answer of the question's type in the test is right."""
        counts: dict[str, Counter[str]] = {}
        for kind, answer in zip(self.types, self.answers, strict=True):
            counts.setdefault(kind, Counter())[answer] += 1
        most = {kind: count.most_common(1)[0][0] for kind, count in counts.items()}
        return torch.tensor([float(most[kind] == a) for kind, a in zip(self.types, self.answers, strict=True)])


@dataclass
class StudyResults:
    """What a study has measured so far.

    Args:
        folder: The study's folder.
        settings: The study.
    """

    folder: StudyFolder
    settings: StudySettings
    _answers: dict[Job, dict[tuple[str, str, str], dict[str, dict[str, str]]]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "StudyResults":
        """The results in a folder.

        Raises:
            UserError: It is no study, or nothing of it is complete.
        """
        folder = StudyFolder(Path(path).absolute())
        if not folder.settings.is_file():
            raise UserError(f"{path} is no study.", "It holds no study.json.", "Name the folder of a study.")
        found = cls(folder, read_settings(read_json(folder.settings)["settings"]))
        if not any(folder.is_complete(Job(START, seed)) for seed in found.settings.seeds):
            raise UserError("Nothing of the study is complete.", f"{path} has no result.json.", "Let it run on.")
        return found

    @property
    def arms(self) -> list[str]:
        """The arms that are complete in some seed, what they begin from first."""
        return [arm for arm in (START, *self.settings.arms) if self.seeds([arm])]

    def seeds(self, arms: Sequence[str]) -> list[int]:
        """The seeds in which all of these arms are complete."""
        return [s for s in self.settings.seeds if all(self.folder.is_complete(Job(arm, s)) for arm in arms)]

    def result(self, arm: str, seed: int) -> dict[str, Any]:
        """The result.json of an arm."""
        found: dict[str, Any] = read_json(self.folder.result(Job(arm, seed)))
        return found

    @cached_property
    def tests(self) -> dict[str, Questions]:
        """The questions of each test, the facts last."""
        rows: dict[str, list[dict[str, str]]] = {}
        for row in read_table(self.folder.questions):
            rows.setdefault(row["test"], []).append(row)
        found = {}
        for test, own in rows.items():
            numbers = {name: number for number, name in enumerate(dict.fromkeys(row["picture"] for row in own))}
            found[test] = Questions(
                tuple(row["question"] for row in own),
                torch.tensor([numbers[row["picture"]] for row in own]),
                tuple(row["type"] for row in own),
                tuple(row["answer"] for row in own),
            )
        return found

    def scores(
        self,
        test: str,
        arms: Sequence[str],
        seeds: Sequence[int],
        shown: Shown = "own",
        moment: Moment = "end",
        column: str = "exact",
    ) -> Tensor:
        """(A, S, Q) scores of a test; NaN where a question was not asked.

        Args:
            test: Its name.
            arms: Complete in all the seeds.
            seeds: Which.
            shown: With which pictures.
            moment: When the arms were measured; one without a measurement at equal cost costs no more, and counts with
                that of its end.
            column: 'exact', 'choice' or 'nats'.
        """
        ids = self.tests[test].ids
        found = torch.full((len(arms), len(seeds), len(ids)), torch.nan, dtype=torch.float64)
        for a, arm in enumerate(arms):
            for s, seed in enumerate(seeds):
                told = self._of(Job(arm, seed))
                rows = told.get((moment, shown, test)) or told.get(("end", shown, test), {})
                for q, name in enumerate(ids):
                    if (row := rows.get(name)) is not None and row[column] != "":
                        found[a, s, q] = float(row[column])
        return found

    def texts(self, arms: Sequence[str], seeds: Sequence[int], moment: Moment = "end") -> Tensor:
        """(A, S, passages) nats per token of the text."""
        rows = [[(told := self.result(arm, seed)["text"]).get(moment, told["end"]) for seed in seeds] for arm in arms]
        return torch.tensor(rows, dtype=torch.float64)

    def layers(self, arm: str, seed: int) -> list[LayerRow]:
        """What was read of the layers of an arm."""
        return read_layers(self.folder.results(Job(arm, seed)) / "layers.csv.gz")

    def causes(self, arm: str, seed: int) -> list[LayerRow]:
        """What was found out of causes in an arm."""
        return read_layers(self.folder.results(Job(arm, seed)) / "causes.csv.gz")

    def _of(self, job: Job) -> dict[tuple[str, str, str], dict[str, dict[str, str]]]:
        """(moment, shown, test) -> question -> its row."""
        if job not in self._answers:
            found: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
            for row in read_table(self.folder.results(job) / "answers.csv.gz"):
                found.setdefault((row["moment"], row["shown"], row["test"]), {})[row["question"]] = row
            self._answers[job] = found
        return self._answers[job]
