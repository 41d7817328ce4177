"""The verb study: arms of tuning policies over seeds, measured alike, compared with intervals, in one report.

Data flow: YAML of the study -> ``study.run_study`` (in any number of sittings) -> the study's folder.
"""

from pathlib import Path

from lightning_mm.cli.parser import Parser
from lightning_mm.core.decisions import log
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json
from lightning_mm.study.folder import StudyFolder
from lightning_mm.study.report import write_study_report
from lightning_mm.study.run import run_study
from lightning_mm.study.settings import StudySettings, read_settings

_FILE = ("-c", "--config")


def study(arguments: list[str]) -> int:
    """Train and measure the arms of a study, and say what they show; it goes on where an earlier call was stopped."""
    files, rest = _files(arguments[1:])
    options = _parser().parse_args(rest)
    if options.report_only:
        log.info("report: %s", write_study_report(_out(files, options.out)))
        return 0
    settings = _settings(files, options.out)
    found = run_study(
        settings,
        _out(files, options.out),
        only=_names(options.only),
        seeds=None if options.seeds is None else [int(each) for each in _names(options.seeds) or ()],
        max_minutes=options.max_minutes,
        workers=options.workers,
        report=options.report,
    )
    log.info("study: %s", found.path)
    return 0


def _files(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The study's files, which are no options of the command line, and all other arguments."""
    files, rest = [], []
    given = iter(arguments)
    for argument in given:
        option, equals, value = argument.partition("=")
        if option in _FILE:
            files.append(value if equals else next(given, ""))
        else:
            rest.append(argument)
    return files, rest


def _settings(files: list[str], out: str | None) -> StudySettings:
    if files:
        return read_settings(*files)
    if out is not None and StudyFolder(Path(out)).settings.is_file():
        return read_settings(read_json(StudyFolder(Path(out)).settings)["settings"])
    raise UserError(
        "No study is named.", "There is neither a file nor a folder of one.", "Give -c configs/study/nano.yaml."
    )


def _out(files: list[str], out: str | None) -> str:
    if not files and out is None:
        raise UserError("No study is named.", "There is neither a file nor a folder of one.", "Give --out FOLDER.")
    return out or f"runs/study-{Path(files[-1]).stem}"


def _names(given: str | None) -> list[str] | None:
    return None if given is None else [name.strip(" []'\"") for name in given.split(",") if name.strip(" []'\"")]


def _parser() -> Parser:
    parser = Parser(prog="lightning-mm study", description=study.__doc__)
    parser.add_argument("--out", type=str | None, default=None, help="Folder of the study; runs/study-NAME if unset.")
    parser.add_argument("--only", type=str | None, default=None, help="Arms to do, as middle,full; all if unset.")
    parser.add_argument("--seeds", type=str | None, default=None, help="Seeds to do, as 0,1; all if unset.")
    parser.add_argument(
        "--max_minutes", type=float | None, default=None, help="Begin no job that would not end in so many minutes."
    )
    parser.add_argument("--workers", type=int, default=1, help="Processes; each has a GPU of its own where there are.")
    parser.add_argument("--report", type=bool, default=True, help="Write study.md and study.html at the end.")
    parser.add_argument(
        "--report_only", type=bool, default=False, help="Do nothing else, from the small files of --out."
    )
    return parser
