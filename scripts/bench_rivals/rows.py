"""The product's rows in the product's order, written as its rivals read them; the model with pictures of another size.

Data flow: training file -> ``MMDataModule`` and its sampler -> messages and picture paths, one row per line of a list.
"""

import json
from pathlib import Path
from typing import Any

from lightning_mm.data.dataloader import EpochSampler
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.sample import IMAGE_MARK, Sample


def write_rows(model: Path, data: Path, out: Path) -> int:
    """Write all rows in the order of the product's first epoch; returns how many there are.

    Raises:
        SystemExit: A row has its picture elsewhere than in front of the first question.
    """
    module = MMDataModule(train=str(data), processor=str(model), num_workers=0)
    module.setup("fit")
    samples = module.samples("train")
    rows = [_row(samples[index]) for index in EpochSampler(len(samples), module.seed)]
    out.write_text(json.dumps(rows), encoding="utf-8")
    return len(rows)


def _row(sample: Sample) -> dict[str, Any]:
    first, *others = (turn.text for turn in sample.turns)
    if not first.startswith(IMAGE_MARK) or IMAGE_MARK in first[len(IMAGE_MARK) :] + "".join(others):
        raise SystemExit(
            f"{sample.origin}: one picture in front of the first question is what all trainers read alike."
        )
    texts = [first.removeprefix(IMAGE_MARK).lstrip("\n"), *others]
    messages = [{"role": turn.role, "content": text} for turn, text in zip(sample.turns, texts, strict=True)]
    return {"messages": messages, "images": [str(path) for path in sample.images]}


def resized(model: Path, size: int, out: Path) -> tuple[Path, int]:
    """The model with pictures of another size; returns its folder and the tokens of a picture.

    Args:
        model: A LLaVA model whose tower takes any size.
        size: Side of a picture in pixels.
        out: Folder to be made.
    """
    processor = json.loads((model / "processor_config.json").read_text(encoding="utf-8"))
    tokens = (size // processor["patch_size"]) ** 2 + processor["num_additional_image_tokens"]
    out.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.name not in ("processor_config.json", "config.json") and not (out / file.name).exists():
            (out / file.name).symlink_to(file.resolve())
    for name in ("size", "crop_size"):
        processor["image_processor"][name] = {"height": size, "width": size}
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | {"image_seq_length": tokens}
    for name, content in (("processor_config.json", processor), ("config.json", config)):
        (out / name).write_text(json.dumps(content), encoding="utf-8")
    return out, tokens
