"""TRL's SFTTrainer and transformers' Trainer on the same rows, in their own environment: python -m bench_rivals.theirs.

Data flow: rows (messages and pictures, in the product's order) -> their dataset, their collator, their trainer ->
``Stopwatch``. What trains is set by ``requires_grad`` before the trainer is made, as their users do.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainerCallback, TrainingArguments

from bench_rivals.stopwatch import Stopwatch


def main() -> None:
    """Train for some steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", choices=("trl", "transformers"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--template", type=Path, required=True, help="Chat template that marks what is learned.")
    parser.add_argument("--train", required=True, help="'full', or first and last block: 8-15.")
    parser.add_argument("--answers_only_head", action="store_true", help="TRL: as it does on a GPU.")
    parser.add_argument("--args", type=json.loads, default={}, help="Training arguments, as JSON.")
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(args.model)
    processor.chat_template = args.template.read_text(encoding="utf-8")
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
    freeze(model, args.train)
    rows = json.loads(args.rows.read_text(encoding="utf-8"))
    make = _trl if args.trainer == "trl" else _transformers
    watch = Stopwatch.of_job()
    trainer = make(watch, model, processor, rows, args.args)
    if args.answers_only_head:
        import trl.trainer.utils

        trl.trainer.utils._use_triton = lambda device: True  # asked there only whether to leave other positions out
    trainer.train()
    watch.write()


def freeze(model: Any, train: str) -> None:
    """Let all but the vision tower train, or only a range of decoder blocks."""
    if train == "full":
        model.get_encoder(modality="image").requires_grad_(False)
        return
    first, last = map(int, train.split("-"))
    model.requires_grad_(False)
    for block in model.get_decoder().layers[first : last + 1]:
        block.requires_grad_(True)


class _StepEnd(TrainerCallback):
    def __init__(self, watch: Stopwatch) -> None:
        self.watch, self.loss = watch, torch.tensor(0.0)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.watch.end(self.loss)


def _watched(trainer: type[Trainer], watch: Stopwatch) -> Any:
    """The trainer's class with the stopwatch at its steps."""

    class Watched(trainer):  # type: ignore[misc, valid-type]
        def __init__(self, **options: Any) -> None:
            self.step_end = _StepEnd(watch)
            super().__init__(**options, callbacks=[self.step_end])

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Tensor:
            watch.begin()
            shifted = inputs["labels"][:, 1:]
            watch.look(inputs, shifted[shifted != -100])
            self.step_end.loss = super().training_step(model, inputs, *rest, **options)
            return self.step_end.loss

    return Watched


def _trl(watch: Stopwatch, model: Any, processor: Any, rows: list[dict[str, Any]], options: dict[str, Any]) -> Any:
    """Several answers in a conversation, all of them learned: assistant_only_loss, with a template that marks them."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature
    from trl import SFTConfig, SFTTrainer

    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"messages": List(message), "images": List(ImageFeature())})
    dataset = Dataset.from_list(rows, features=features)
    config = SFTConfig(assistant_only_loss=True, **options)
    watched = _watched(SFTTrainer, watch)
    return watched(model=model, args=config, train_dataset=dataset, processing_class=processor)


def _transformers(
    watch: Stopwatch, model: Any, processor: Any, rows: list[dict[str, Any]], options: dict[str, Any]
) -> Any:
    """A plain collator with labels, as in transformers' own guides."""

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = processor.apply_chat_template(
            [_parts(example) for example in examples],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        answers = inputs.pop("assistant_masks")
        return {**inputs, "labels": inputs["input_ids"].masked_fill(torch.as_tensor(answers) == 0, -100)}

    arguments = TrainingArguments(remove_unused_columns=False, **options)
    return _watched(Trainer, watch)(model=model, args=arguments, train_dataset=rows, data_collator=collate)


def _parts(example: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages whose first question has the pictures in front of its words."""
    pictures: list[dict[str, Any]] = [{"type": "image", "image": Image.open(path)} for path in example["images"]]
    messages = []
    for message in example["messages"]:
        messages.append({**message, "content": [*pictures, {"type": "text", "text": message["content"]}]})
        pictures = []
    return messages


if __name__ == "__main__":
    main()
