"""VLMEvalKit on an exported folder of any family, as its model class `Exported`; started in a clone of VLMEvalKit.

    cd VLMEvalKit && python .../examples/benchmarks/vlmevalkit_export.py --config mine.json

where mine.json names the folder and the benchmarks:

    {"model": {"mine": {"class": "Exported", "folder": "/path/to/runs/first/export"}},
     "data": {"MMStar": {"class": "ImageMCQDataset", "dataset": "MMStar"}}}

Data flow: pictures and texts of a question -> one message -> `ExportedModel` -> the answer -> VLMEvalKit's scores.
"""

import runpy
import sys
from collections.abc import Sequence
from typing import Any

sys.path.insert(1, "")  # the clone, from which this is started: its package need not be installed

import vlmeval.vlm
from exported import ExportedModel
from PIL import Image
from vlmeval.vlm.base import BaseModel


class Exported(BaseModel):
    """A complete folder as a model of VLMEvalKit, with pictures and texts in their order.

    Args:
        folder: The exported folder.
        device: Where it runs; None: CUDA where there is one.
        dtype: Dtype of the weights; 'auto': that of the files.
        settings: Settings of the generation, such as max_new_tokens (256 by default).
    """

    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(self, folder: str, device: str | None = None, dtype: str = "auto", **settings: object) -> None:
        super().__init__()
        self.settings = settings
        self.exported = ExportedModel(folder, device, dtype)

    def generate_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to a message of texts and pictures, each {"type": ..., "value": text or path}."""
        content = [_part(part["type"], part["value"]) for part in message]
        return self.exported.answer([{"role": "user", "content": content}], self.settings)


def _part(kind: str, value: str) -> dict[str, Any]:
    """A part of a message of transformers; pictures are decoded as in training, by PIL."""
    return {"type": kind, kind: Image.open(value).convert("RGB") if kind == "image" else value}


if __name__ == "__main__":
    vlmeval.vlm.Exported = Exported
    runpy.run_path("run.py", run_name="__main__")
