"""What a run shows where no command line has set up the console: messages, and in a notebook a link to the report.

Data flow: log records -> a handler, if nobody has set one up; a file -> a link under the notebook's cell.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

from lightning_mm.core.console import ConsoleHandler

log = logging.getLogger("lightning_mm")


def show_messages() -> None:
    """Show this package's messages, unless a handler of it or of the root logger is there to decide that."""
    if log.handlers or logging.getLogger().handlers:
        return
    # A notebook prints stderr on red, as if something had failed.
    log.addHandler(ConsoleHandler() if _shell() is None else logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)


def show_link(file: Path) -> bool:
    """Put a link to a file under the cell that is running; False where no notebook is."""
    shell = _shell()
    if shell is None or "IPKernelApp" not in shell.config:
        return False
    from IPython.display import FileLink, display  # there already, since a notebook is running

    display(FileLink(os.path.relpath(file), result_html_prefix="report: "))
    return True


def _shell() -> Any:
    """The running IPython; None where there is none. IPython is not imported for it."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()
