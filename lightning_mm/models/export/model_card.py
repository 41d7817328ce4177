"""The model card of an export, README.md: where the model comes from, how it was trained and measured, how to use it.

Data flow: ``Provenance`` (base, facts, hyperparameters, accuracies) -> ``write_card`` -> README.md with the hub's
header, through huggingface_hub's ``ModelCard``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lightning_mm.report.sections.run import wilson

Library = Literal["transformers", "peft"]
_PACKAGES = ("lightning-mm", "torch", "transformers", "peft", "lightning")
_MOMENTS = {"before": "before training", "after": "after training", "no_image": "after, without the picture"}


@dataclass(frozen=True)
class Provenance:
    """Origin of a trained model, for its model card.

    Args:
        base: Folder or hub name of the base model.
        revision: Revision of a hub model; None (default): not given.
        facts: Further lines of the card, in this order: {'Policy': ..., 'Layers trained': ..., 'Data': ...}; none by
            default.
        hyperparameters: Settings of the training by name; none by default.
        accuracy: Rows of the run's evaluation.json: type, n, and accuracies (fractions) before, after, no_image and
            majority; none by default.
        data: Name of the data that the accuracies were measured on; empty by default.
        license: Identifier of the base model's license; None (default): not known.
        repo: Name of the model on the hub; None (default): it is not pushed.
    """

    base: str
    revision: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    accuracy: Sequence[Mapping[str, Any]] = ()
    data: str = ""
    license: str | None = None
    repo: str | None = None


def write_card(folder: Path, origin: Provenance, library: Library) -> None:
    """Write the model card, README.md.

    Args:
        folder: The exported folder.
        origin: Origin of the model. Its license, if known, is stated in the header; otherwise the user has to choose.
        library: Library that loads the folder.
    """
    name = origin.repo or f"{Path(origin.base).name}, fine-tuned"
    base = f"{_public(origin.base)} at {origin.revision}" if origin.revision else _public(origin.base)
    if origin.license:
        terms = f"{origin.license}, the base model's; the data's license applies too."
    else:
        terms = "not stated; the base model's and the data's licenses apply. Say yours here and in the header."
    rows = {"Base model": base, **origin.facts, "License": terms}
    parts = [
        f"---\n{_header(origin, library).to_yaml()}\n---",
        f"# {name}",
        "\n".join(f"- **{key}**: {value}" for key, value in rows.items()),
        *_results(origin),
        "## Use",
        f"```python\n{_USE[library].format(name=origin.repo or '.', base=origin.base)}```",
        *_settings(origin),
        "## Versions",
        "\n".join(f"- {package} {number}" for package, number in versions().items()),
    ]
    ModelCard("\n\n".join(parts) + "\n").save(folder / "README.md")


def versions() -> dict[str, str]:
    """Versions of the packages that training depends on, without those that are not installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _header(origin: Provenance, library: Library) -> ModelCardData:
    on_hub = not Path(origin.base).exists() and not Path(origin.base).is_absolute()
    scores = [(moment, row) for row in origin.accuracy for moment in ("after",) if row["type"] == "all"]
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="custom",
            dataset_name=origin.data or "held-out questions",
            metric_type="exact_match",
            metric_name=f"Exact match {_MOMENTS[moment]}",
            metric_value=round(row[moment], 4),
        )
        for moment, row in scores
        if row.get(moment) is not None
    ]
    return ModelCardData(
        base_model=origin.base if on_hub else None,  # it must name a hub model, not a local folder
        library_name=library,
        pipeline_tag="image-text-to-text",
        license=origin.license,
        tags=["lightning_mm"],
        eval_results=results or None,
        model_name=origin.repo or Path(origin.base).name if results else None,
    )


def _results(origin: Provenance) -> list[str]:
    rows = [row for row in origin.accuracy if row.get("n")]
    if not rows:
        return []
    moments = [moment for moment in (*_MOMENTS, "majority") if any(row.get(moment) is not None for row in rows)]
    titles = {**_MOMENTS, "majority": "most frequent answer"}
    table = [
        ["questions", "n", *(titles[moment] for moment in moments)],
        ["---"] * (2 + len(moments)),
        *([str(row["type"]), str(row["n"]), *(_share(row.get(m), row["n"]) for m in moments)] for row in rows),
    ]
    note = f"Exact match on {origin.data or 'held-out questions'} by question type, with 95 % Wilson intervals."
    return ["## Results", note, "\n".join(f"| {' | '.join(cells)} |" for cells in table)]


def _share(share: float | None, n: int) -> str:
    if share is None:
        return "not measured"
    low, high = wilson(share, n)
    return f"{share:.1%} ({low:.1%} to {high:.1%})"


def _public(value: object) -> object:
    """A setting as strangers may read it: of a path on this machine, only its last part."""
    is_path = isinstance(value, str) and (value.startswith(("/", "~", ".")) or Path(value).exists())
    return Path(str(value)).name if is_path and value not in ("", ".") else value


def _settings(origin: Provenance) -> list[str]:
    if not origin.hyperparameters:
        return []
    cells = {name: str(_public(value)).replace("|", "\\|") for name, value in origin.hyperparameters.items()}
    lines = (f"| {name} | {value} |" for name, value in cells.items())
    return ["## Hyperparameters", "\n".join(["| setting | value |", "| --- | --- |", *lines])]


_ASK = """\
messages = [
    {{
        "role": "user",
        "content": [
            {{"type": "image", "image": Image.new("RGB", (224, 224), "red")}},  # yours: Image.open("photo.jpg")
            {{"type": "text", "text": "What is in the picture?"}},
        ],
    }}
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=32)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
"""

_USE: Mapping[Library, str] = {
    "transformers": """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "{name}"  # the model's name on the hub, or its folder
processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name)
"""
    + _ASK,
    "peft": """\
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "{name}"  # the adapter's name on the hub, or its folder
base = "{base}"
processor = AutoProcessor.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), name)
"""
    + _ASK,
}
