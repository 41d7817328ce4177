"""Turns from a list of messages, in the forms that training data is written in.

Data flow: the list -> ``MessageReader.read`` -> ``Conversation``: turns, and the pictures and videos that they hold.

A message has a role and a content under names that are found or given (``Tags``), or is a pair of question and answer.
Content is text, or a list of parts: OpenAI's, TRL's, Qwen's, Gemini's and Anthropic's. Calls of tools are in
``tool_calls``, in parts, or a turn of their own (``function_call``).
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_mm.data.readers.invalid_row import InvalidRow, kind_of, require_text
from lightning_mm.data.readers.training_marks import TRAIN_KEYS, read_train_mark
from lightning_mm.data.sample import IMAGE_MARK, VIDEO_MARK, Role, Turn

ROLES: Mapping[str, str] = {
    **dict.fromkeys(("human", "user", "prompter", "instruction"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "bing", "bard", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "tool_result", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
"""Names of speakers -> role; ``function_call`` is an assistant that calls tools."""
_ROLE_KEYS = ("from", "role", "speaker")
_CONTENT_KEYS = ("value", "content", "text", "parts")
PAIRS = (
    ("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("human", "bot"), ("question", "answer"),
    ("query", "response"), ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("q", "a"),
)  # fmt: skip
"""Keys of a message that is a question with its answer."""
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_MEDIA_KEYS = {"image": "images", "images": "images", "video": "videos", "videos": "videos"}
_MARKS = {"images": IMAGE_MARK, "videos": VIDEO_MARK}
_TURN_KEYS = {"type", "tool_calls", "function_call", *_REASONING_KEYS, *_MEDIA_KEYS, *TRAIN_KEYS}
_QWEN_IMAGE = re.compile(r"(?:Picture \d+: ?)?<img>([^<>\n]+)</img>\n?")


@dataclass(frozen=True)
class Tags:
    """Names that a file uses, where it has its own; the words are LLaMA-Factory's.

    Args:
        role: Key of the speaker in a message; '' finds it.
        content: Key of the text, likewise.
        roles: Name of a speaker -> role, besides the known ones.
    """

    role: str = ""
    content: str = ""
    roles: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tags: Mapping[str, str]) -> "Tags":
        """The names in ``Source.tags``: role_tag, content_tag, user_tag, ..."""
        named = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
        named |= {"observation_tag": "tool", "function_tag": "function_call"}
        roles = {tags[key].casefold(): role for key, role in named.items() if tags.get(key)}
        return cls(tags.get("role_tag") or "", tags.get("content_tag") or "", roles)


@dataclass
class Conversation:
    """What a row says, before its pictures are looked up.

    Args:
        turns: In order; texts hold one mark per picture or video.
        images: What stands for each picture in the turns, in order; None for one of the row's own list.
        videos: Likewise.
        ignored: Keys of messages that were not read.
    """

    turns: list[Turn] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def add_media(self, kind: str, value: Any) -> str:
        """Add a picture ("images") or a video ("videos"); returns its mark."""
        (self.images if kind == "images" else self.videos).append(value)
        return _MARKS[kind]


class MessageReader:
    """Converts the messages of one row.

    Args:
        tags: Names that the file uses.
        question_type: Of answers that give none of their own.

    Attributes:
        found: What was read.
    """

    def __init__(self, tags: Tags, question_type: str = "any") -> None:
        self._tags, self.question_type = tags, question_type
        self.found = Conversation()

    def read(self, messages: list[Any]) -> Conversation:
        """The turns of these messages, added to those read before.

        Raises:
            InvalidRow: One of them cannot be read.
        """
        for message in messages:
            if not isinstance(message, dict):
                raise InvalidRow(f"wrong type: a turn is {kind_of(message)}")
            pair = None if self._tags.content else pair_keys(message)
            if pair is not None:
                self._add_pair(message, *pair)
            else:
                self._add(message)
        return self.found

    def add(self, role: Role, content: Any, **more: Any) -> None:
        """Add one turn.

        Args:
            role: Its speaker.
            content: Its text or parts.
            more: Fields of ``Turn``.
        """
        calls: list[Any] = []
        before = len(self.found.turns)
        text = content if isinstance(content, str) else self._joined(content, role, calls, more)
        if role == "user" and not text and len(self.found.turns) > before:
            return  # its parts were the results of tools, which are turns of their own
        if role == "user" and "<img>" in text:
            text = _QWEN_IMAGE.sub(lambda match: self.found.add_media("images", match[1].strip()), text)
        if calls:
            more["tool_calls"] = json.dumps(calls, ensure_ascii=False)
        self.found.turns.append(Turn(role, text, **more))

    def _add_pair(self, message: dict[str, Any], question: str, answer: str) -> None:
        if isinstance(system := message.get("system"), str) and system.strip():
            self.add("system", system)
        self.add("user", message[question])
        more: dict[str, Any] = {"train": read_train_mark(message, "turn") is not False}
        if message.get(answer) is not None:
            self.add("assistant", message[answer], question_type=self.question_type, **more)
        self._ignore(message, {question, answer, "system"})

    def _add(self, message: dict[str, Any]) -> None:
        role_key = self._tags.role or next((key for key in _ROLE_KEYS if message.get(key) is not None), "role")
        content_key = self._tags.content or next((key for key in _CONTENT_KEYS if message.get(key) is not None), "")
        name = require_text(message.get(role_key), "role")
        word = name.strip().casefold()
        said = self._tags.roles.get(word, ROLES.get(word))
        if said is None:
            raise InvalidRow(f"unknown role: {name!r}, known are {', '.join({**ROLES, **self._tags.roles})}")
        self._ignore(message, {role_key, content_key})
        content = message.get(content_key)
        mark = read_train_mark(message, "turn")
        if said == "system" and isinstance(content, str) and not content.strip():
            return  # as if there were none
        if said == "function_call":
            self._add_calls(content, mark)
            return
        more: dict[str, Any] = {}
        role: Role = said  # type: ignore[assignment]
        if role == "assistant":
            more = self._of_answer(message, mark)
            if calls := message.get("tool_calls") or message.get("function_call"):  # OpenAI's, and their older one
                more["tool_calls"] = json.dumps(as_calls(calls), ensure_ascii=False)
                content = "" if content is None else content
        elif mark:
            raise InvalidRow(f"training mark on the {role}: only turns of the assistant are learned")
        self.add(role, self._with_media(message, content), **more)

    def _of_answer(self, message: dict[str, Any], mark: bool | None) -> dict[str, Any]:
        kind = message.get("type")
        reasoning = next((message[key] for key in _REASONING_KEYS if message.get(key) is not None), "")
        return {
            "question_type": self.question_type if kind is None else require_text(kind, "type"),
            "train": mark is not False,
            "reasoning": require_text(reasoning, "reasoning"),
        }

    def _with_media(self, message: dict[str, Any], content: Any) -> Any:
        """The content with marks of the pictures that its message lists, in front of a text without marks."""
        if audio := next((key for key in ("audio", "audios") if message.get(key)), None):
            raise InvalidRow(f"audio: a turn has {audio!r}, and audio is not trained on")
        for key, kind in _MEDIA_KEYS.items():
            if not message.get(key):
                continue
            if not isinstance(content, str):
                raise InvalidRow(f"two image lists: a turn has {key!r} besides its content parts")
            values = message[key] if isinstance(message[key], list) else [message[key]]
            marks = [self.found.add_media(kind, value) for value in values]
            if _MARKS[kind] not in content:
                content = "".join(mark + "\n" for mark in marks) + content
        return content

    def _add_calls(self, content: Any, mark: bool | None) -> None:
        """Add calls as an assistant turn; calls that follow one another are one turn."""
        calls = as_calls(content)
        last = self.found.turns[-1] if self.found.turns else None
        if last is not None and last.role == "assistant" and last.tool_calls and not last.text:
            self.found.turns[-1] = Turn(
                "assistant", "", last.question_type, last.train, last.reasoning,
                json.dumps([*json.loads(last.tool_calls), *calls], ensure_ascii=False),
            )  # fmt: skip
            return
        text = json.dumps(calls, ensure_ascii=False)
        self.found.turns.append(Turn("assistant", "", self.question_type, mark is not False, tool_calls=text))

    def _ignore(self, message: dict[str, Any], read: set[str]) -> None:
        self.found.ignored.update(
            f"message.{key}" for key, value in message.items() if value is not None and key not in read | _TURN_KEYS
        )

    def _joined(self, content: object, role: Role, calls: list[Any], more: dict[str, Any]) -> str:
        """Parts as text with marks; their pictures are kept, calls and reasoning go to ``calls`` and ``more``."""
        if isinstance(content, dict):
            content = [content]
        if not isinstance(content, list):
            raise InvalidRow(f"wrong type: the text of a turn is {kind_of(content)}")
        texts: list[str] = []
        for part in content:
            given = {"text": part} if isinstance(part, str) else part
            if not isinstance(given, dict):
                raise InvalidRow(f"unknown content part: {part!r:.80}")
            kind = part_kind(given)
            if kind == "text":
                texts.append(require_text(given.get("content" if given.get("text") is None else "text"), "text"))
            elif kind in ("images", "videos"):
                texts.append(self.found.add_media(kind, media_of_part(given)))
            elif kind == "reasoning" and role == "assistant":
                words = next((given[key] for key in ("thinking", "reasoning", "text") if given.get(key)), "")
                more["reasoning"] = more.get("reasoning", "") + require_text(words, "reasoning")
            elif kind == "tool_use" and role == "assistant":
                identifier = {"id": given["id"]} if given.get("id") else {}
                calls += as_calls([{**identifier, "name": given.get("name"), "arguments": given.get("input") or {}}])
            elif kind == "tool_result" and role == "user" and not any(text.strip() for text in texts):
                self.add("tool", given.get("content") or "")
            else:
                raise InvalidRow(
                    f"audio: {part!r:.80} is audio, which is not trained on"
                    if kind == "audio"
                    else f"unknown content part: {part!r:.80}"
                )
        return "".join(texts)


def pair_keys(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """The keys of question and answer, if a message is such a pair."""
    if any(message.get(key) is not None for key in ("from", "role", "speaker")):
        return None
    return next((pair for pair in PAIRS if all(key in message for key in pair)), None)


_PART_TYPES = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **dict.fromkeys(("image", "image_url", "input_image", "image_path", "image_base64"), "images"),
    **dict.fromkeys(("video", "video_url", "input_video"), "videos"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("thinking", "reasoning"), "reasoning"),
}
_PART_KEYS = ("image", "image_url", "video", "video_url", "audio", "text")


def part_kind(part: Mapping[str, Any]) -> str:
    """What a content part is: text, images, videos, audio, reasoning, another type, or '' if nothing says so."""
    if isinstance(part.get("type"), str):
        return _PART_TYPES.get(part["type"], part["type"])
    inline = part.get("inline_data") or part.get("inlineData") or part.get("fileData") or part.get("file_data")
    if isinstance(inline, dict):  # Gemini's
        mime = str(inline.get("mime_type") or inline.get("mimeType") or "")
        return {"image": "images", "video": "videos"}.get(mime.partition("/")[0], "audio")
    found = [key for key in _PART_KEYS if part.get(key) is not None]  # Qwen's parts have no type
    return _PART_TYPES[found[0]] if len(found) == 1 else ""


def media_of_part(part: Mapping[str, Any]) -> Any:
    """What a part gives for its picture or video; None if it only marks the place."""
    for key in ("image", "image_url", "video", "video_url", "path", "url", "source", "bytes", "base64", "data",
                "inline_data", "inlineData", "fileData", "file_data", "image_path", "image_base64",
                "content"):  # fmt: skip
        if part.get(key) is not None:
            return part[key]
    return MediaIndex(part["index"]) if type(part.get("index")) is int else None


class MediaIndex(int):
    """Index in the row's own list of pictures, which a part may give."""


def as_calls(given: Any) -> list[dict[str, Any]]:
    """Calls of tools in OpenAI's form, with arguments as an object.

    Args:
        given: A call or a list of them, as JSON text or decoded: ``{"name", "arguments"}`` or OpenAI's.

    Raises:
        InvalidRow: One of them is no call.
    """
    if isinstance(given, str):
        given = _decoded(given)
    made = []
    for call in given if isinstance(given, list) else [given]:
        call = _decoded(call) if isinstance(call, str) else call
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRow(f"wrong tool call: {call!r:.80} has no name")
        arguments: Any = next(
            (function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {}
        )
        arguments = _decoded(arguments) if isinstance(arguments, str) else arguments
        identifier = {"id": call["id"]} if call.get("id") else {}
        made.append({**identifier, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return made


def as_tools(given: Any) -> str:
    """Tools as a JSON list in OpenAI's form; '' for none.

    Args:
        given: A list of tools, as JSON text or decoded; a tool may lack the wrapping ``{"type": "function", ...}``.

    Raises:
        InvalidRow: It is no such list.
    """
    if given in (None, "", []):
        return ""
    tools = _decoded(given) if isinstance(given, str) else given
    tools = tools if isinstance(tools, list) else [tools]
    tools = [_decoded(tool) if isinstance(tool, str) else tool for tool in tools]
    if wrong := next((tool for tool in tools if not isinstance(tool, dict)), None):
        raise InvalidRow(f"wrong tools: {wrong!r:.80} is {kind_of(wrong)}")
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return json.dumps(wrapped, ensure_ascii=False) if wrapped else ""


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRow(f"not JSON: {text!r:.60} of a tool, {error}") from error
