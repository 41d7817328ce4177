"""Writes the activations that tests/geometry/golden compares libraries on:
python scripts/golden_activations.py [MODEL] [DATA FOLDER].

Hidden states of three blocks at the last prompt token, of the same scenes read twice: picture and question, and caption
and question. The pictures are those of this project's nano data (CC BY-SA 4.0); the numbers are the
nano model's. Then run scripts/golden_geometry.py.

Shapes: L layers, N scenes, D features.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

BLOCKS = (7, 17, 27)
SCENES = 150
QUESTION = "Which things are here?"
OUTPUT = Path(__file__).parent.parent / "tests" / "geometry" / "golden" / "activations.safetensors"


def scenes(data: Path) -> list[dict[str, Any]]:
    """Rows with a caption of their own, held-out ones first."""
    rows = [row for name in ("test", "val", "train") for row in json.loads((data / f"{name}.json").read_text())]
    return list({row["caption"]: row for row in rows if row["caption"]}.values())[:SCENES]


@torch.inference_mode()
def states(model: Any, processor: Any, text: str, picture: Image.Image | None) -> Tensor:
    """(L, D) outputs of the blocks at the last prompt token."""
    content = [{"type": "text", "text": text}]
    if picture is not None:
        content.insert(0, {"type": "image"})
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    return torch.stack([hidden[block + 1][0, -1] for block in BLOCKS])


def main(model: str = "runs/quickstart/model", data: str = "nano/data") -> None:
    """Write one file with two tensors (L, N, D) in float16."""
    backbone, processor = AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(model)
    rows = scenes(Path(data))
    pictures = [Image.open(Path(data) / row["image"]).convert("RGB") for row in rows]
    read = {
        "picture": [states(backbone, processor, QUESTION, picture) for picture in pictures],
        "caption": [states(backbone, processor, f"A picture of {row['caption']}.\n{QUESTION}", None) for row in rows],
    }
    tensors = {name: torch.stack(parts, 1).half().contiguous() for name, parts in read.items()}
    assert all(tensor.isfinite().all() for tensor in tensors.values()), "an activation exceeds float16"
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, OUTPUT, {"blocks": str(BLOCKS), "pictures": "nano data, CC BY-SA 4.0"})
    print(OUTPUT, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, OUTPUT.stat().st_size)


if __name__ == "__main__":
    main(*sys.argv[1:])
