"""The folder of a run that is not ours: made when the looks begin, with decisions and a report when they end.

Data flow: folder of the loop's loggers -> ``GuestRun`` (``inspection``, ``inspection-2``, ...) -> inspection.json,
census.json, decisions.json, ledger.jsonl, report.html beside what the runner writes.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from lightning_mm.analysis.findings import copy_earlier_findings
from lightning_mm.callbacks.subject import Subject
from lightning_mm.core.decisions import DecisionLog, log, log_decision, run_is_open
from lightning_mm.core.distributed import all_gather_object, rank_and_world_size, run_on_all_ranks
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_json
from lightning_mm.core.notebook import show_link
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report.html import write_report
from lightning_mm.tuning.census import take_census

NAME = "inspection"


class GuestRun:
    """What our callbacks write of someone else's run.

    Args:
        root: Folder that the run's folder is made in; never one that another run has. A collective call.
        earlier: Folder of the run that is resumed, if it is one.
        step: Optimizer steps done.

    Raises:
        UserError: Nothing can be written there; on all ranks.
    """

    def __init__(self, root: Path, earlier: Path | None = None, step: int = 0) -> None:
        self.decisions = DecisionLog()
        first = rank_and_world_size()[0] == 0
        made, failure = run_on_all_ranks(lambda: RunDirectory.create(root, default=NAME) if first else None)
        if failure:
            raise failure if isinstance(failure, UserError) else RuntimeError(failure)
        self.directory: RunDirectory = all_gather_object(made)[0]
        if first and step and earlier is not None and earlier.is_dir():
            copy_earlier_findings(RunDirectory(earlier), self.directory, step)
            with self.recording():
                log_decision("inspection.earlier", str(earlier), "the run that is resumed; its findings are copied")

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While active, decisions are recorded for this run, unless a run of ours records them."""
        if run_is_open():
            yield
            return
        with self.decisions.opened():
            self.decisions.take_pending()
            yield

    def note_start(self, subject: Subject) -> None:
        """Write down what is looked into and what trains; called on rank 0."""
        title = f"{type(subject.mm.model).__name__} while it trains"
        write_json(self.directory.inspection, {"title": title, "model": subject.mm.source, "labels": {}})
        try:
            write_json(self.directory.census, take_census(subject.mm, subject.plan).to_dict())
        except UserError as error:
            log_decision("callbacks.census", "none", f"{error.what} {error.why}")

    def finish(self, subject: Subject) -> None:
        """Write decisions, rejected rows and the report, and say where; called on rank 0."""
        write_json(self.directory.decisions, [asdict(decision) for decision in self.decisions])
        subject.rejected.write(self.directory.ledger)
        write_report(self.directory.path)
        if show_link(self.directory.report):
            return
        if log.isEnabledFor(logging.INFO):
            log.info("report: %s", self.directory.report)
        else:  # a stranger's script shows no messages
            print(f"report: {self.directory.report}")


def newest_run(root: Path) -> Path | None:
    """The folder that the last run before made in ``root``; None if there is none."""
    made = [path.parent for path in root.glob(f"{NAME}*/layers.csv")]
    return max(made, key=lambda path: (path / "run.json").stat().st_mtime, default=None)
