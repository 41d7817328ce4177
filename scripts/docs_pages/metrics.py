"""The page of logged metrics, from ``core.metric_names``.

Data flow: the vocabulary of metrics -> one table.
"""

from docs_pages.markdown import cell, table
from lightning_mm.core import metric_names

_HEAD = """# Metrics

What a run logs, in `metrics.csv` and to every logger, under these keys. Keys that end in a question type, an optimizer
group, or a measure and its site stand for one key each.
"""


def page() -> str:
    """Markdown: one row per key."""
    known = metric_names.declare(["TYPE"], ["GROUP"], [("MEASURE", "SITE")])
    better = {"min": "lower", "max": "higher", None: ""}
    rows = [
        (f"`{name}`", cell(each.unit), cell(each.meaning.replace("'", "")), better[each.better])
        for name, each in known.items()
    ]
    return _HEAD + "\n" + table(("key", "unit", "meaning", "better"), rows)
