"""The model card: a README.md that says where an exported model comes from.

Data flow: ``Origin`` -> README.md in the exported folder, in the form that the hub reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml


@dataclass(frozen=True)
class Origin:
    """Where a trained model comes from.

    Args:
        base: Folder or hub name of the model it started from.
        revision: Revision of a hub model.
        facts: What else to say, in this order: {'Policy': ..., 'Layers trained': ..., 'Data': ...}.
    """

    base: str
    revision: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def write_card(folder: Path, origin: Origin, library: Literal["transformers", "peft"]) -> None:
    """Write README.md. The license is the user's to state; none is claimed."""
    header: dict[str, object] = {"library_name": library, "pipeline_tag": "image-text-to-text"}
    if not Path(origin.base).exists():  # the hub knows its own models, not someone's folders
        header["base_model"] = origin.base
    header["tags"] = ["lightning_mm"]
    base = f"{origin.base} at {origin.revision}" if origin.revision else origin.base
    rows = {"Base model": base, **origin.facts}
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {Path(origin.base).name}, fine-tuned",
        "",
        *(f"- **{name}**: {value}" for name, value in rows.items()),
        "- **License**: not stated; the base model's and the data's licenses apply. Say yours here and in the header.",
        "",
        *_LOADING[library],
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


_LOADING = {
    "transformers": [
        "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        'model = AutoModelForImageTextToText.from_pretrained("this folder")',
        'processor = AutoProcessor.from_pretrained("this folder")',
        "```",
    ],
    "peft": [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForImageTextToText",
        "",
        'base = AutoModelForImageTextToText.from_pretrained("the base model", dtype="float32")',
        'model = PeftModel.from_pretrained(base, "this folder")',
        "```",
    ],
}
