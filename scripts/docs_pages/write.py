"""Writes the generated pages of the docs site; mkdocs runs it (mkdocs-gen-files), and a test calls ``pages``.

Data flow: parsers, docstrings, catalogs and the source -> Markdown by page -> the site's reference/.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from docs_pages import api, classes, measures, metrics, options, user_errors  # noqa: E402


def pages() -> dict[str, str]:
    """Path of a page in the docs folder -> its Markdown."""
    return {
        "reference/options.md": options.page(),
        "reference/policies.md": classes.policies_page(),
        "reference/callbacks.md": classes.callbacks_page(),
        "reference/measures.md": measures.page(),
        "reference/metrics.md": metrics.page(),
        "reference/errors.md": user_errors.page(ROOT / "lightning_mm"),
        "reference/python.md": api.page(),
        "reference/changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    }


if __name__ == "__main__" or __name__ == "<run_path>":
    import mkdocs_gen_files

    for path, text in pages().items():
        with mkdocs_gen_files.open(path, "w") as file:
            file.write(text)
