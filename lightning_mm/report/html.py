"""The HTML report: ``report.html``, one file that opens anywhere and is complete without any service.

Data flow: the files of a run directory -> ``page`` (what is said) -> ``templates/`` (how it looks) -> report.html, with
the charts of ``chart_book`` and the scripts that make them interactive inside. Of several runs: ``comparison``.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_atomically
from lightning_mm.core.run_directory import RunDirectory

if TYPE_CHECKING:
    from jinja2.bccache import BytecodeCache


def write_report(run: str | Path, *more: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run from whatever its folder holds, or one that compares several runs.

    Args:
        run: The folder of a run; only the files of the contract are read.
        more: Folders of further runs, which are compared with it: accuracy, curves, and each measure by layer.
        out: The file to write. None is ``report.html`` in the folder of a single run; of several runs,
            ``compare-<names>.html`` beside the folder of the first.

    Returns:
        The path of the report.

    Raises:
        UserError: If there is no such folder, a run is named twice, or the report cannot be written.
    """
    directories = [RunDirectory.open(path) for path in (run, *more)]
    if len(directories) == 1:
        from lightning_mm.report.page import page_content  # late, with altair: most commands write no report

        path, content = directories[0].report, page_content(directories[0])
        return write_page(Path(out) if out else path, "report.html.jinja", content)
    from lightning_mm.report.comparison import comparison_content, default_path

    content = comparison_content(directories)
    return write_page(Path(out) if out else default_path(directories), "compare.html.jinja", content)


def write_page(path: Path, template: str, content: dict[str, Any]) -> Path:
    """Write a page; returns its path.

    Args:
        path: The file.
        template: Name of its template.
        content: What the template shows, by name.

    Raises:
        UserError: It cannot be written.
    """
    page = _rendered(template, content)
    try:
        write_atomically(path, page.encode("utf-8", errors="replace"))
    except OSError as error:
        fix = "Free some space, or make the folder writable."
        raise UserError(f"{path} cannot be written.", str(error), fix) from error
    return path


def _rendered(template: str, content: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from lightning_mm.report import chart_book
    from lightning_mm.report.figures import theme

    book, (library, packed) = chart_book.ChartBook(), chart_book.library()
    environment = Environment(
        loader=PackageLoader("lightning_mm.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        bytecode_cache=_compiled_templates(),
    )
    environment.globals |= {
        "book": book,
        "chart": book.chart,
        "at": book.at,
        "policy": lambda *styles: chart_book.policy(tuple(map(str, styles)), (chart_book.script(), library)),
        "script": chart_book.script(),
        "library": packed,
        "theme": theme,
        "dark_figures": theme.dark_css(),
    }
    return environment.get_template(template).render(content)


@cache
def _compiled_templates() -> "BytecodeCache":
    """Keeps compiled templates for the next report of this process; compiling takes half of a short report's time."""
    from jinja2.bccache import Bucket, BytecodeCache

    class InMemory(BytecodeCache):
        def __init__(self) -> None:
            self.kept: dict[str, bytes] = {}

        def load_bytecode(self, bucket: Bucket) -> None:
            if bucket.key in self.kept:
                bucket.bytecode_from_string(self.kept[bucket.key])

        def dump_bytecode(self, bucket: Bucket) -> None:
            self.kept[bucket.key] = bucket.bytecode_to_string()

    return InMemory()
