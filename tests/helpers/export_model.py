"""Tiny models in memory, trained by hand, that the export's tests write out.

Data flow: folder of a tiny model -> ``subject`` -> ``Subject.adapt`` and ``Subject.shake`` -> the tests' exports.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lightning_mm.models.export.export import Origin
from lightning_mm.models.layout import ModelLayout, Region
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.models.lora import LoRA, add_lora
from lightning_mm.models.processor import Processing, load_processing

PLAIN = LoRA(r=4, alpha=8.0)
DORA = LoRA(r=4, alpha=8.0, rslora=True, dora=True)


@dataclass(frozen=True)
class Subject:
    """A tiny model in memory, with what its exports need."""

    base: Path
    model: Any
    layout: ModelLayout
    processing: Processing
    inputs: dict[str, torch.Tensor]

    @property
    def origin(self) -> Origin:
        return Origin(str(self.base), facts={"Policy": "LoRAOnMiddle(layers='1-2')", "Layers trained": "1-2 of 4"})

    @property
    def connector(self) -> tuple[str, ...]:
        return self.layout.parameters_in(Region.CONNECTOR)

    @property
    def middle(self) -> list[str]:
        """Linear modules of decoder blocks 1 and 2."""
        places = {n.rpartition(".")[0]: p for n, p in self.layout.locations.items()}
        return [n for n, p in places.items() if p.layer in (1, 2) and n in self.layout.linears]

    def shake(self, names: Callable[[str], bool] | tuple[str, ...]) -> None:
        """Move weights far enough for the logits to show it."""
        chosen = names if callable(names) else names.__contains__
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if chosen(name):
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter += 0.3 * noise * parameter.std(correction=0).clamp_min(0.05)

    def adapt(self, targets: list[str], options: LoRA) -> None:
        """LoRA with random weights; the first target has a rank of its own."""
        add_lora(self.model, targets, options, {targets[0]: 2})
        self.shake(lambda name: ".lora_" in name)


def subject(base: Path) -> Subject:
    model = load_model(Backbone(path=str(base)))
    processing = load_processing(str(base))
    content = [{"type": "image"}, {"type": "text", "text": "Which colour is it?"}]
    text = processing.render([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processing.encode([text], [[Image.new("RGB", (40, 28), (200, 30, 90))]], "right").inputs
    return Subject(base, model, ModelLayout.of(model), processing, inputs)
