"""Ask an exported model about one picture, with transformers alone: python scripts/ask.py FOLDER PICTURE "QUESTION"."""

import sys

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def ask(folder: str, picture: str, question: str) -> str:
    """The model's greedy answer."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(picture).convert("RGB"), text=text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return str(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    print(ask(*sys.argv[1:]))
