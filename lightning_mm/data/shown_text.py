"""A row as the console shows it: the text that the model reads, with what it learns between marks.

Data flow: parts of a ``ShownRow`` -> ``shown_text`` -> rich's ``Text``, which keeps its marks where it is piped.
"""

from rich.text import Text

from lightning_mm.data.row_meter import ShownRow
from lightning_mm.report.figures.figure import printable

LEARNED = ("⟦", "⟧")
"""Stand around what is learned."""
_MOST_CHARACTERS = 400
_STYLES = {"context": "", "learned": "bold green", "cut": "strike dim"}


def shown_text(row: ShownRow, indent: str = "  ", max_lines: int | None = None) -> Text:
    """The text of a row, line by line: what is learned between ⟦ ⟧, what is cut off after the word CUT.

    Args:
        row: The row.
        indent: In front of each line.
        max_lines: Most lines; the middle of longer text is left out, and that is said. None: all of it.
    """
    text = Text()
    for kind, part in row.parts:
        opening, closing = LEARNED if kind == "learned" else ("CUT " if kind == "cut" else "", "")
        shown = part if max_lines is None else _shortened(part)
        text.append(opening + "\n".join(map(printable, shown.split("\n"))) + closing, _STYLES[kind])
    lines = list(text.split("\n"))
    if max_lines is not None and len(lines) > max_lines:
        head, tail = max_lines // 2, max_lines - max_lines // 2 - 1
        lines = [*lines[:head], Text(f"... {len(lines) - head - tail} more lines ..."), *lines[-tail:]]
    return Text("\n").join(Text(indent) + line for line in lines)


def _shortened(text: str) -> str:
    """A text without its middle, where it is long."""
    left_out = len(text) - _MOST_CHARACTERS
    half = _MOST_CHARACTERS // 2
    return text if left_out <= 0 else f"{text[:half]} ... {left_out:,} more characters ... {text[-half:]}"


def described(row: ShownRow) -> str:
    """Where a row is from, its pictures and its lengths, in one line."""
    sample = row.sample
    names = [*sample.images, *sample.videos]
    sizes = [f"{image.width} x {image.height}" for image in row.images]
    shown = [f"{printable(each.name)} {size}" for each, size in zip(names, sizes, strict=False)][:4]
    more = [f"{len(sizes) - 4} more"] if len(sizes) > 4 else []
    text, image, learned, total = row.tokens
    lengths = f"{total} tokens: {image} image, {text} text, {learned} of them learned"
    return "; ".join([printable(sample.origin), ", ".join([*shown, *more]) or "no picture", lengths])
