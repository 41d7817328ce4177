"""A model whose weights are finite and which overflows in the rows of one sign, and data with such rows.

Data flow: a tiny Gemma 3 -> its embedding of ``SIGN`` so large that the scale of the embeddings makes it infinite, and
a head of its own, which stays small; rows -> some of them ask with ``SIGN``.
"""

import json
from collections.abc import Collection
from pathlib import Path
from shutil import copytree

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.helpers.data import make_rows

SIGN = "~"
"""A byte of no other row; a token of its own."""


def overflowing_model(gemma3: Path, folder: Path) -> Path:
    """A copy of a tiny Gemma 3, in ``folder``, that overflows at ``SIGN``."""
    copytree(gemma3, folder)
    weights = load_file(folder / "model.safetensors")
    (embedding,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    (token,) = AutoTokenizer.from_pretrained(folder)(SIGN, add_special_tokens=False)["input_ids"]
    weights["lm_head.weight"] = weights[embedding].clone()
    weights[embedding][token] = torch.finfo(torch.float32).max
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rows_with_sign(folder: Path, count: int, bad: Collection[int]) -> Path:
    """A file of ``count`` conversations about pictures; those of the indices ``bad`` ask with ``SIGN``."""
    rows = make_rows(folder, count)
    for index in bad:
        rows[index]["conversations"][0]["value"] += f" {SIGN}"
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"
