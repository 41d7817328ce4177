"""The first question of each of your conversations, for `questions.yaml`; pictures are relative to IMAGE_ROOT.

Data flow: a row of LLaVA's JSON -> its pictures, first question and answer -> 1 where the answers agree, else 0.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

Row = dict[str, Any]


def pictures(row: Row) -> list[Image.Image]:
    """The pictures of a row."""
    named = row.get("image") or []
    root = Path(os.environ.get("IMAGE_ROOT", "."))
    return [Image.open(root / name).convert("RGB") for name in ([named] if isinstance(named, str) else named)]


def question(row: Row) -> str:
    """The first question."""
    return str(row["conversations"][0]["value"]).replace("<image>", "").strip()


def truth(row: Row) -> str:
    """The answer to the first question."""
    return str(row["conversations"][1]["value"])


def score(row: Row, answers: Sequence[str]) -> dict[str, float]:
    """Whether the answer is the truth, but for case, spaces and a full stop at the end."""
    given, expected = (" ".join(text.lower().split()).rstrip(".") for text in (answers[0], truth(row)))
    return {"exact_match": float(given == expected)}
