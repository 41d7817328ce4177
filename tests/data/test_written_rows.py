"""A sample that is written as a row and read again is the same sample, whatever it holds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lightning_mm.data.image_source import ImageBytes
from lightning_mm.data.readers.conversations import read_conversations
from lightning_mm.data.sample import Sample, Turn
from lightning_mm.data.written_rows import IMAGE_ROOT, row_of_sample

CALLS = json.dumps([{"type": "function", "function": {"name": "zoom", "arguments": {"x": 1}}}])
TOOLS = json.dumps([{"type": "function", "function": {"name": "zoom", "description": "Zooms.", "parameters": {}}}])
PLAIN = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cat, ünïcode.", "animal"))
SAMPLES = {
    "plain": Sample("a", PLAIN),
    "system, context, reasoning": Sample(
        "7",
        (
            Turn("system", "Be brief."),
            Turn("user", "Compare <image> and <image>."),
            Turn("assistant", "They differ.", train=False),
            Turn("user", "Why?"),
            Turn("assistant", "One is red.", reasoning="I look."),
        ),
    ),
    "tools": Sample(
        "t",
        (
            Turn("user", "<image> Zoom in."),
            Turn("assistant", "", tool_calls=CALLS),
            Turn("tool", "done"),
            Turn("assistant", "A dot."),
        ),
        tools=TOOLS,
    ),
    "text": Sample("x", (Turn("user", "Are you there?"), Turn("assistant", "Yes."))),
}


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("name", SAMPLES)
def test_it_is_read_as_it_was(name: str, in_memory: bool, tmp_path: Path) -> None:
    count = sum(turn.text.count("<image>") for turn in SAMPLES[name].turns)
    files = [tmp_path / "deep" / f"{number}.png" for number in range(count)]
    (tmp_path / "deep").mkdir()
    for number, file in enumerate(files):
        Image.new("RGB", (4 + number, 4)).save(file)
    images = tuple(ImageBytes(file.name, file.read_bytes()) if in_memory else file for file in files)
    sample = replace(SAMPLES[name], images=images)
    written = tmp_path / "elsewhere" / "rows.json"
    written.parent.mkdir()
    written.write_text(json.dumps({"fault": {"step": 3}, "rows": [row_of_sample(sample)]}))
    found = read_conversations(written, IMAGE_ROOT)
    assert found.rejections == ()
    (read,) = found.samples
    assert (read.id, read.turns, read.images) == (sample.id, sample.turns, sample.images)
    assert json.loads(read.tools or "[]") == json.loads(sample.tools or "[]")
