"""Chat templates of models that reason and call tools, in the construction of published ones but shorter.

``QWEN3``: an answer after the last question has its reasoning or an empty place for it, earlier answers have none.
``QWEN3_VL_THINKING``: the same, and the generation prompt opens the place. ``GLM_4V``: every answer has a place, which
is empty before the last question; no stop token. ``GLM_41V``: knows nothing of reasoning; no stop token. ``R1``: the
generation prompt opens a place, and no answer is written with one.
"""

_CONTENT = (
    "{%- macro content(m) -%}{%- if m.content is string -%}{{- m.content -}}{%- else -%}"
    "{%- for p in m.content -%}{%- if p.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
_TOOLS = (
    "{%- if tools -%}{{- '<|im_start|>system\n# Tools\n<tools>' -}}"
    "{%- for tool in tools -%}{{- '\n' ~ (tool | tojson) -}}{%- endfor -%}{{- '\n</tools><|im_end|>\n' -}}{%- endif -%}"
)
_LAST_QUESTION = (
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
)
_QWEN3_ANSWER = (
    "{%- set said = content(m) -%}{%- set thought = '' -%}"
    "{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}"
    "{%- elif '</think>' in said -%}"
    "{%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) -%}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') -}}"
    "{%- else -%}{{- '<|im_start|>assistant\n' + said -}}{%- endif -%}"
    "{%- for call in m.tool_calls or [] -%}{%- set call = call.function -%}"
    '{{- \'\n<tool_call>\n{"name": "\' ~ call.name ~ \'", "arguments": \' -}}'
    "{{- (call.arguments | tojson) ~ '}\n</tool_call>' -}}"
    "{%- endfor -%}{{- '<|im_end|>\n' -}}"
)


def _qwen3(prompt: str) -> str:
    return (
        f"{_CONTENT}{_TOOLS}{_LAST_QUESTION}"
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}" + _QWEN3_ANSWER + "{%- elif m.role == 'tool' -%}"
        "{{- '<|im_start|>user\n<tool_response>\n' + content(m) + '\n</tool_response><|im_end|>\n' -}}"
        "{%- else -%}{{- '<|im_start|>' + m.role + '\n' + content(m) + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '" + prompt + "' -}}{%- endif -%}"
    )


QWEN3 = _qwen3("<|im_start|>assistant\n")
QWEN3_VL_THINKING = _qwen3("<|im_start|>assistant\n<think>\n")
R1 = (
    _CONTENT + "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{{- content(m).split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else content(m) -}}"
    "{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}"
)


def _glm(answer: str) -> str:
    return (
        _CONTENT + _LAST_QUESTION + "{{- '[gMASK]<sop>' -}}{%- for m in messages -%}{{- '<|' + m.role + '|>\n' -}}"
        "{%- if m.role == 'assistant' -%}" + answer + "{%- else -%}{{- content(m) -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
    )


GLM_41V = _glm("{{- content(m) -}}")
GLM_4V = _glm(
    "{%- set thought = m.reasoning_content or '' -%}"
    "{{- '<think>' + (thought.strip() if loop.index0 > ns.last else '') + '</think>\n' + content(m).strip() -}}"
)
