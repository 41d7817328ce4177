"""Training code as a stranger writes it: transformers, PEFT and Lightning alone, nothing of this package.

Data flow: a tiny model's folder -> a LightningModule, rows and a collate function -> batches with labels.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainerCallback, TrainingArguments

from lightning_mm.models.processor import optional_video_processor

COLOURS = ("red", "green", "blue", "white", "black", "grey")


def load(folder: Path, lora: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model in train mode, all of it trained or adapted by PEFT (with dropout); and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    with optional_video_processor():
        processor = AutoProcessor.from_pretrained(folder)
    if lora:
        torch.manual_seed(1)
        config = LoraConfig(
            r=2, lora_dropout=0.3, target_modules=r".*(?:q_proj|o_proj|up_proj)", init_lora_weights=False
        )
        model = get_peft_model(model, config)
    return model.train(), processor


def rows(count: int = 8) -> list[dict[str, Any]]:
    """Conversations about pictures of one colour, with the pictures in memory."""
    colours = [COLOURS[i % len(COLOURS)] for i in range(count)]
    return [{"image": Image.new("RGB", (40, 40), c), "prompt": "What colour is it?", "answer": c} for c in colours]


class Collate:
    """Rows -> model inputs with labels."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        texts = []
        for row in rows:
            asked = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
            turns = [{"role": "user", "content": asked}]
            turns.append({"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]})
            texts.append(self.processor.apply_chat_template(turns, tokenize=False))
        batch = self.processor(text=texts, images=[[row["image"]] for row in rows], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {**batch, "labels": labels}


class StrangersModule(L.LightningModule):
    """A LightningModule that knows nothing of this package; its model is an attribute of an attribute."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.holder = nn.ModuleDict({"backbone": model})
        self.dropout = nn.Dropout(0.1)
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.dropout(self.holder["backbone"](**batch).loss + torch.rand(())) / 0.9
        self.losses.append(float(loss.detach()))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adagrad([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit(
    folder: Path,
    out: Path,
    callbacks: Sequence[L.Callback] = (),
    *,
    lora: bool = False,
    steps: int = 4,
    count: int = 8,
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[StrangersModule, L.Trainer]:
    """Fit a stranger's module with a plain trainer and loader."""
    torch.manual_seed(0)
    model, processor = load(folder, lora)
    module = StrangersModule(model)
    loader = DataLoader(rows(count), batch_size=2, shuffle=True, collate_fn=Collate(processor))  # type: ignore[arg-type]
    trainer = L.Trainer(
        default_root_dir=out,
        max_steps=steps,
        max_epochs=10,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, **options},
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module, trainer


def train_with_transformers(
    folder: Path, out: Path, callbacks: Sequence[TrainerCallback] = (), *, lora: bool = False, **options: Any
) -> Trainer:
    """Train by transformers' Trainer on the same rows, for three steps."""
    trainer = make_trainer(folder, out, callbacks, lora=lora, **options)
    trainer.train()
    return trainer


def make_trainer(
    folder: Path, out: Path, callbacks: Sequence[TrainerCallback] = (), *, lora: bool = False, **options: Any
) -> Trainer:
    """Transformers' Trainer with a tiny model and its rows, which are evaluated on too."""
    model, processor = load(folder, lora)
    settings: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "remove_unused_columns": False, "dataloader_pin_memory": False, **options,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(out), **settings)
    return Trainer(model, arguments, Collate(processor), rows(), rows(4), callbacks=list(callbacks))  # type: ignore[arg-type]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal_weights(one: nn.Module, other: nn.Module) -> None:
    """Bit for bit."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert [name for name, value in mine.items() if not torch.equal(value, theirs[name])] == []


def questions(probes: Path) -> Path:
    """A file of questions about the pictures of probes, as CausalCallback takes them."""
    made = [
        {"id": row["id"], "image": row["image"], "question": "What is it?", "constraint": "it", "answer": "A cat."}
        for row in json.loads(probes.read_text())[:4]
    ]
    file = probes.with_name("questions.json")
    file.write_text(json.dumps(made))
    return file
