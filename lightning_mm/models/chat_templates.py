"""Chat templates in the styles that families of models were taught with, for models that we write ourselves.

Data flow: a style and the text that stands for a picture -> a Jinja template -> the processor's
``apply_chat_template``. Contents may be a string, or a list of ``{"type": "image"}`` and ``{"type": "text", ...}``
parts.
"""


def chatml(image: str, system: str = "") -> str:
    """Qwen, InternVL, SmolLM2: ``<|im_start|>user\\n...<|im_end|>\\n``.

    Args:
        image: What a picture becomes in the text.
        system: A system prompt for talks that begin without one, as Qwen2-VL's; empty adds none.
    """
    first = (
        f"{{%- if loop.first and message['role'] != 'system' -%}}{{{{- {_turn('system', system)!r} -}}}}{{%- endif -%}}"
    )
    return _talk(
        (first if system else "")
        + "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        + _content(image)
        + _say("<|im_end|>\n"),
        prompt="<|im_start|>assistant\n",
    )


def _turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def vicuna(image: str) -> str:
    """LLaVA 1.5: ``USER: ... ASSISTANT: ...</s>``; the answer's leading space is not part of the prompt."""
    return _talk(
        "{%- if message['role'] == 'system' -%}"
        + _content(image)
        + "{{- ' ' -}}{%- else -%}{{- message['role'] | upper + ': ' -}}"
        + _content(image)
        + "{{- '</s>' if message['role'] == 'assistant' else ' ' -}}{%- endif -%}",
        prompt="ASSISTANT:",
    )


def mistral(image: str) -> str:
    """LLaVA-NeXT on Mistral, Pixtral: ``<s>[INST] ... [/INST] ...</s>``; there is no mark of the assistant's turn."""
    return "{{- '<s>' -}}" + _talk(
        "{%- if message['role'] == 'assistant' -%}{{- ' ' -}}"
        + _content(image)
        + "{{- '</s>' -}}{%- else -%}{{- '[INST] ' -}}"
        + _content(image)
        + "{{- ' [/INST]' -}}{%- endif -%}",
        prompt="",
    )


def gemma(image: str) -> str:
    """Gemma: ``<bos><start_of_turn>user\\n...<end_of_turn>\\n``; the assistant is called the model."""
    return "{{- '<bos>' -}}" + _talk(
        "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}"
        + _content(image, " | trim")
        + _say("<end_of_turn>\n"),
        prompt="<start_of_turn>model\n",
    )


def llama3(image: str) -> str:
    """Llama 3: ``<|start_header_id|>user<|end_header_id|>\\n\\n...<|eot_id|>``."""
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return "{{- '<|begin_of_text|>' -}}" + _talk(
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
        + _content(image, " | trim")
        + _say("<|eot_id|>"),
        prompt=header.format("assistant"),
    )


def idefics(image: str) -> str:
    """Idefics3, SmolVLM: ``<|im_start|>User:...<end_of_utterance>\\nAssistant: ...``."""
    return "{{- '<|im_start|>' -}}" + _talk(
        "{{- message['role'] | capitalize -}}"
        "{{- ':' if message['content'] is not string and message['content'][0]['type'] == 'image' else ': ' -}}"
        + _content(image)
        + _say("<end_of_utterance>\n"),
        prompt="Assistant:",
    )


def _talk(message: str, prompt: str) -> str:
    ending = f"{{%- if add_generation_prompt -%}}{_say(prompt)}{{%- endif -%}}" if prompt else ""
    return f"{{%- for message in messages -%}}{message}{{%- endfor -%}}{ending}"


def _say(text: str) -> str:
    return f"{{{{- {text!r} -}}}}"


def _content(image: str, tidy: str = "") -> str:
    return (
        f"{{%- if message['content'] is string -%}}{{{{- message['content']{tidy} -}}}}{{%- else -%}}"
        "{%- for part in message['content'] -%}"
        f"{{%- if part['type'] == 'image' -%}}{_say(image)}"
        f"{{%- elif part['type'] == 'text' -%}}{{{{- part['text']{tidy} -}}}}{{%- endif -%}}"
        "{%- endfor -%}{%- endif -%}"
    )
