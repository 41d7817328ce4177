"""The HTML report: ``report.html``, one file that opens anywhere and is complete without any service.

Data flow: the files of a run directory -> ``page`` (what is said) -> ``templates/`` (how it looks) -> report.html.
"""

from pathlib import Path

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_atomically
from lightning_mm.core.run_directory import RunDirectory


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the run directory, from whatever it holds.

    Args:
        run: The folder of a run; only the files of the contract are read.

    Returns:
        The path of the report.

    Raises:
        UserError: If there is no such folder, or the report cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # late, with altair: most commands write no report

    from lightning_mm.report.page import page_content

    directory = RunDirectory.open(run)
    template = Environment(
        loader=PackageLoader("lightning_mm.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja")
    page = template.render(page_content(directory))
    try:
        write_atomically(directory.report, page.encode("utf-8", errors="replace"))
    except OSError as error:
        fix = "Free some space, or make the folder writable."
        raise UserError(f"{directory.report} cannot be written.", str(error), fix) from error
    return directory.report
