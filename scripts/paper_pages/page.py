"""Writes a page of items as one HTML file that needs nothing else, and their table as Markdown.

Data flow: title, commands and ``Item``s -> index.html and table.md in a folder.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from paper_pages.items import Item

_STYLE = """
body { font: 15px/1.5 system-ui, DejaVu Sans, sans-serif; color: #22262b; background: #fbfaf8; margin: 0 auto;
  max-width: 1060px; padding: 24px; }
section { background: #fff; border: 1px solid #e6e3dd; border-radius: 8px; padding: 14px 20px; margin: 18px 0; }
h1 { font-size: 24px; } h2 { font-size: 18px; margin: 4px 0 8px; }
table { border-collapse: collapse; margin: 10px 0; font-size: 13px; } td, th { border-bottom: 1px solid #e6e3dd;
  padding: 4px 10px 4px 0; text-align: left; vertical-align: top; }
.published { color: #5d636b; } .files, .less { color: #5d636b; font-size: 13px; }
pre { background: #f2f0ec; padding: 10px; overflow-x: auto; font-size: 12.5px; }
.charts { display: flex; flex-wrap: wrap; gap: 12px; } svg { max-width: 100%; height: auto; }
"""


def write_page(
    folder: Path, title: str, lead: Sequence[str], items: Sequence[Item], commands: str, full_size: str
) -> Path:
    """Write index.html and table.md; returns the path of the page.

    Args:
        folder: Where to; made if it is not there.
        title: Of the paper.
        lead: Sentences before the items.
        items: Figures and tables, in the paper's order.
        commands: What was run here.
        full_size: What is run for the paper's own model, with its cost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    body = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(each)}</p>" for each in lead), _summary(items)]
    body += [_section(item, folder) for item in items]
    body.append(f"<section><h2>Commands</h2><h3>Here</h3><pre>{escape(commands)}</pre>")
    body.append(f"<h3>LLaVA-1.5-7B on one GPU</h3><pre>{escape(full_size)}</pre></section>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    page = folder / "index.html"
    page.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>')
    (folder / "table.md").write_text(_markdown(items))
    return page


def _summary(items: Sequence[Item]) -> str:
    rows = "".join(
        f"<tr><th>{escape(item.name)}</th><td>{escape(item.published)}</td><td>{escape(' '.join(item.words))}</td></tr>"
        for item in items
    )
    head = "<tr><th>Item</th><th>Published</th><th>Here</th></tr>"
    return f"<section><h2>In words</h2><table>{head}{rows}</table></section>"


def _section(item: Item, folder: Path) -> str:
    parts = [f"<section><h2>{escape(item.name)}</h2>", f'<p class="published">Published: {escape(item.published)}</p>']
    parts += [f"<p>{escape(words)}</p>" for words in item.words]
    parts.append(f'<div class="charts">{"".join(item.charts)}</div>')
    for head, rows in item.tables:
        cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        parts.append(f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{cells}</table>")
    if item.deviations:
        listed = "".join(f"<li>{escape(each)}</li>" for each in item.deviations)
        parts.append(f'<p class="less">Differs from what is published:</p><ul class="less">{listed}</ul>')
    if item.files:
        named = ", ".join(str(file) for file in item.files)
        parts.append(f'<p class="files">Numbers: {escape(named)}</p>')
    return "".join(parts) + "</section>"


def _markdown(items: Sequence[Item]) -> str:
    lines = ["| Item | Published | Here |", "|---|---|---|"]
    for item in items:
        cells = (item.name, item.published, " ".join(item.words))
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
