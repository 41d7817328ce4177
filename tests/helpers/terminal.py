"""A terminal's screen, from what was written to it."""

import re


def redrawn(output: str) -> list[str]:
    """The lines that a terminal holds after some output: carriage returns, cursor up and erased lines are followed."""
    lines, row, column = [""], 0, 0
    for part in re.split(r"(\n|\r|\x1b\[\d*[A-Za-z]|\x1b\[\?\d+[a-z]|\x1b\[[\d;]*m)", output):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]
