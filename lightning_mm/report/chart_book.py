"""The charts of one page: their SVG where they stand, and what a browser needs to make them interactive.

Data flow: templates call ``chart`` for each ``Figure`` -> HTML with its SVG and its text table; specifications and
numbers are collected -> ``packed`` -> one compressed block of the page -> ``scripts/chart.js``. Compressed text holds
no markup, whatever the names in it are.
"""

import base64
import gzip
import hashlib
import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

from markupsafe import Markup, escape

from lightning_mm.report.figures.figure import Figure, printable

_SCRIPTS = ("theme.js", "tables.js", "state.js", "chart.js", "layers.js", "start.js")


class ChartBook:
    """The charts of one page in reading order, and the places of marks that HTML draws."""

    def __init__(self) -> None:
        self.charts: list[dict[str, Any]] = []
        self._places: dict[str, str] = {}

    def chart(self, figure: Figure, title: str, place: str = "", look: str = "plot") -> Markup:
        """A figure as HTML: its SVG if it was drawn, which a browser replaces by the live chart, and its text table.

        Args:
            figure: What is shown.
            title: Its heading, for files that are saved of it.
            place: What stands beside the heading.
            look: CSS classes.
        """
        index, words = len(self.charts), printable(figure.description)
        table = figure.table
        self.charts.append(
            {
                "spec": figure.live_spec(),
                "title": printable(title),
                "place": printable(place),
                "size": figure.size,
                "origin": figure.origin,
                "columns": table.columns if table else (),
                "values": table.by_column() if table else [],
                "note": table.note if table else "",
                "live": figure.live,
            }
        )
        plot = Markup('<div class="{}" data-chart="{}" tabindex="0" role="group" aria-label="{}">{}</div>').format(
            look, index, words, Markup(figure.svg() if figure.is_drawn else "")
        )
        return plot + self._written(figure, title)

    def at(self, **places: float) -> Markup:
        """A CSS class that puts an element at per cent of its parent's box: attributes of style would need a leave.

        Args:
            places: CSS properties and their per cent, such as left and width.
        """
        rule = ";".join(f"{name}:{float(share):.2f}%" for name, share in places.items())
        return Markup(escape(self._places.setdefault(rule, f"at{len(self._places)}")))

    @property
    def rules(self) -> str:
        """The rules of all these classes."""
        return "".join(f".{name}{{{rule}}}" for rule, name in self._places.items())

    def packed(self) -> str:
        """All charts as base64 of compressed JSON."""
        text = json.dumps(self.charts, separators=(",", ":"))
        if "NaN" in text or "Infinity" in text:  # as values they are no JSON; in a name they stay
            text = json.dumps(json.loads(text, parse_constant=lambda _: None), separators=(",", ":"))
        return _packed(text.encode())

    @staticmethod
    def _written(figure: Figure, title: str) -> Markup:
        table = figure.table
        if table is None:
            return Markup("")
        head = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in table.columns)
        body = Markup("").join(
            Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(printable(cell)) for cell in row))
            for row in table.written()
        )
        return Markup(
            '<noscript><details class="written"><summary>{} in numbers</summary><table><thead><tr>{}</tr></thead>'
            "<tbody>{}</tbody></table></details></noscript>"
        ).format(printable(title), head, body)


def policy(styles: tuple[str, ...], scripts: tuple[str, ...]) -> str:
    """The Content-Security-Policy of a page: nothing is asked for, and only these styles and scripts count."""
    allowed = {"style-src": styles, "script-src": scripts}
    hashes = [f"{name} {' '.join(map(_hash, texts))}" for name, texts in allowed.items()]
    return "; ".join(["default-src 'none'", *hashes, "img-src data:", "base-uri 'none'", "form-action 'none'"])


@lru_cache(maxsize=1)
def script() -> str:
    """The report's own script."""
    folder = files("lightning_mm.report") / "scripts"
    parts = [(folder / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    return "(() => {\n'use strict';\n" + "\n".join(parts) + "})();\n"


@lru_cache(maxsize=1)
def library() -> tuple[str, str]:
    """Vega, Vega-Lite and Vega-Embed as a browser runs them, and as the page holds them: compressed, base64."""
    packed = (files("lightning_mm.report") / "scripts" / "vega.js.gz").read_bytes()
    return gzip.decompress(packed).decode("utf-8"), base64.b64encode(packed).decode("ascii")


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode("ascii")


@lru_cache(maxsize=8)
def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8', errors='replace')).digest()).decode()}'"
