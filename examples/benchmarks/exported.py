"""An exported folder that answers chats with pictures, through transformers alone; the adapters beside it use it.

Data flow: folder of `lightning-mm export` -> processor and model -> messages with pictures -> text of the answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

SETTINGS = ("max_new_tokens", "do_sample", "temperature", "top_p", "num_beams")
"""What a suite may ask of a generation."""


class ExportedModel:
    """A complete folder, as `lightning-mm export` writes it.

    Args:
        folder: The exported folder, or any other complete folder of transformers, such as that of the base model.
        device: 'cuda', 'cpu', ...; None (default): CUDA where there is one.
        dtype: 'auto' (default): that of the files; or 'bfloat16', 'float16', 'float32'.
    """

    def __init__(self, folder: str, device: str | None = None, dtype: str = "auto") -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        processor: Any = AutoProcessor.from_pretrained(folder)
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        self.processor, self.model = processor, model.to(self.device).eval()

    @torch.no_grad()
    def answer(self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
        """The answer to a chat.

        Args:
            messages: Chat of transformers: role, and content of {"type": "text", "text": ...} and {"type": "image",
                "image": picture, path or address}.
            settings: Settings of the generation; it is greedy unless they say otherwise. `until`: the answer ends
                before the first of these texts.
        """
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.device, self.model.dtype)
        wanted: dict[str, Any] = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
        wanted.setdefault("max_new_tokens", 256)
        if not wanted.setdefault("do_sample", bool(wanted.get("temperature"))):
            wanted |= {"temperature": None, "top_p": None, "top_k": None}
        done = self.model.generate(**inputs, **wanted)
        text = self.processor.decode(done[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ends = settings.get("until") or ()
        for end in [ends] if isinstance(ends, str) else ends:
            text = text.split(end)[0] if end else text
        return str(text).strip()
