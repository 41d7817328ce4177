"""Samples written as rows that the readers read back: for a file of a few rows that is to be used again.

Data flow: ``Sample`` -> ``row_of_sample`` -> a row in OpenAI's form (``messages``, ``images``, ``videos``, ``tools``)
-> JSON -> ``readers`` with the image root ``/`` -> the same ``Sample``.
"""

import base64
import json
from pathlib import Path
from typing import Any

from lightning_mm.data.image_source import ImageSource
from lightning_mm.data.sample import Sample, Turn

IMAGE_ROOT = "/"
"""Image root of such rows: paths of files are absolute."""


def row_of_sample(sample: Sample) -> dict[str, Any]:
    """A row in plain values: pictures that are files by their absolute paths, others by their content in base64.

    Further columns of the original row (boxes, choices) are left out; training does not read them.

    Args:
        sample: A conversation of any source.
    """
    row: dict[str, Any] = {"id": sample.id, "messages": [_message(turn) for turn in sample.turns]}
    for name in ("images", "videos"):
        if media := getattr(sample, name):
            row[name] = [_media(each) for each in media]
    if sample.tools:
        row["tools"] = json.loads(sample.tools)
    return row


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if turn.question_type != "any":
        message["type"] = turn.question_type
    if not turn.train:
        message["train"] = False
    if turn.reasoning:
        message["reasoning"] = turn.reasoning
    if turn.tool_calls:
        message["tool_calls"] = json.loads(turn.tool_calls)
    return message


def _media(source: ImageSource) -> str | dict[str, str]:
    if isinstance(source, Path):
        return str(source.absolute())
    return {"path": source.name, "base64": base64.b64encode(source.read_bytes()).decode("ascii")}
