"""Write the page of one paper from what its commands left: runs/papers/pN/index.html and table.md.

    python scripts/paper_page.py p2 --folder runs/papers/p2 --seconds 412

Data flow: folders of ``inspect``, ``trace``, ``edit`` -> ``paper_pages.p1`` to ``p3`` -> page and table.
"""

import argparse
from pathlib import Path

from paper_pages import p1, p2, p3
from paper_pages.page import write_page

PAPERS = {"p1": p1, "p2": p2, "p3": p3}


def main() -> None:
    """Read and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paper", choices=sorted(PAPERS))
    parser.add_argument("--folder", type=Path, required=True, help="Where the commands wrote to.")
    args = parser.parse_args()
    paper, folder = PAPERS[args.paper], args.folder
    commands = (folder / "commands.txt").read_text() if (folder / "commands.txt").is_file() else ""
    full = (folder / "seven_b.txt").read_text() if (folder / "seven_b.txt").is_file() else ""
    items = paper.items(folder)
    page = write_page(folder, paper.TITLE, paper.LEAD, items, commands, full)
    for item in items:
        print(f"{item.name}")
        print(f"    published: {item.published}")
        for words in filter(None, item.words):
            print(f"    here:      {words}")
    print(f"page: {page}")


if __name__ == "__main__":
    main()
