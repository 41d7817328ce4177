"""A model's chat template: what it takes, found by trial renderings, and turns rendered with it.

Templates differ in what they read of a message. Found by trial: whether each role's content is a list of parts or a
string, what is written for an image, under which key an assistant's reasoning is read, and whether tools and their
calls are. A conversation that has something that the template does not write is refused by name.

Data flow: ``ModelProcessor`` -> ``ChatTemplate``; turns -> messages -> text -> ``chat``.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from lightning_mm.core.errors import UserError
from lightning_mm.data.sample import IMAGE_MARK, Role, Turn
from lightning_mm.models.processor import Message, ModelProcessor
from lightning_mm.models.template_limits import TemplateLimitError

QUESTION, ANSWER, SECOND_QUESTION, SECOND_ANSWER = "Lorem ipsum", "dolor sit", "amet consectetur", "adipiscing elit"
_REASONING, _TOOL = "sed do eiusmod", "tempor_incididunt"
TRIAL_TURNS = (
    Turn("user", QUESTION),
    Turn("assistant", ANSWER),
    Turn("user", SECOND_QUESTION),
    Turn("assistant", SECOND_ANSWER),
)
_TRIAL_CALL = (
    Turn("user", QUESTION),
    Turn("assistant", "", tool_calls=json.dumps([{"id": "abcdefghi", "function": {"name": _TOOL, "arguments": {}}}])),
    Turn("tool", SECOND_ANSWER),
)
_TRIAL_TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": _TOOL,
                "description": QUESTION,
                "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": QUESTION}}},
            },
        }
    ]
)
_OF_TEMPLATES = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""What a template raises that refuses a conversation, or is wrong."""


class ChatError(ValueError):
    """Why a conversation cannot be rendered with this template, as ``category: detail``."""


class ChatTemplate:
    """Renders turns with a model's chat template.

    Args:
        processing: The model's processor.
        special_tokens: Special tokens that texts may contain nevertheless, such as those around boxes; () for none.

    Raises:
        ChatError: The template writes no text, or no placeholder for an image.
        UserError: A token of ``special_tokens`` is none of the tokenizer's, or structures conversations.

    Attributes:
        placeholder: Text that the template writes for an image.
    """

    def __init__(self, processing: ModelProcessor, special_tokens: Sequence[str] = ()) -> None:
        self._processing = processing
        self._special = any_of(processing.special_tokens)
        self._in_parts: dict[Role, bool] = {"user": True, "assistant": True, "system": True, "tool": True}
        self.placeholder = ""
        self._learn_layout()
        self.placeholder = self._learn_placeholder()
        self._refuse_reserved(special_tokens)
        self._special = any_of(processing.special_tokens - set(special_tokens))

    def write(self, turns: Sequence[Turn], add_generation_prompt: bool = False, tools: str = "") -> str:
        """The text of a conversation.

        Args:
            turns: Messages with one ``<image>`` mark per image.
            add_generation_prompt: Whether the text ends with the header of an assistant turn.
            tools: Tools that the assistant may call, as a JSON list; '' for none.

        Raises:
            ChatError: The template refuses it.
        """
        return self._render(self._messages(turns), add_generation_prompt, _tools(tools))

    def check(self, turns: Sequence[Turn], tools: str = "") -> None:
        """Refuse what the template would lose, and special tokens in any text.

        Args:
            turns: Messages.
            tools: Tools as a JSON list; '' for none.

        Raises:
            ChatError: It names what is refused.
        """
        wanted = {
            "reasoning": any(turn.reasoning for turn in turns) and self._reasoning_key is None,
            "tools": bool(tools) and not self._takes_tools,
            "tool calls": any(turn.tool_calls for turn in turns) and not self._takes_calls,
            "turns of tools": any(turn.role == "tool" for turn in turns) and not self._takes_results,
        }
        if lost := next((name for name, is_lost in wanted.items() if is_lost), None):
            raise ChatError(f"template has no place for {lost}: it writes nothing of it")
        for turn in turns:
            text = turn.text.replace(IMAGE_MARK, "") if turn.role == "user" else turn.text
            calls = json.dumps(tool_calls(turn), ensure_ascii=False)
            if found := next(filter(None, map(self._special.search, (text, turn.reasoning, calls))), None):
                raise ChatError(f"special token in the text: the {turn.role} says {found.group()!r}")
        if found := self._special.search(json.dumps(_tools(tools), ensure_ascii=False)):
            raise ChatError(f"special token in the text: a tool's description says {found.group()!r}")

    def _messages(self, turns: Sequence[Turn]) -> list[Message]:
        messages: list[Message] = []
        pending: list[dict[str, Any]] = []
        for turn in turns:
            message: Message = {"role": turn.role, "content": self._content(turn)}
            if turn.reasoning and self._reasoning_key is not None:
                message[self._reasoning_key] = turn.reasoning
            if calls := tool_calls(turn):
                message["tool_calls"], pending = calls, list(calls)
            elif turn.role == "tool" and pending:  # results come in the order of their calls
                call = pending.pop(0)
                message |= {"name": call["function"]["name"], **({"tool_call_id": call["id"]} if "id" in call else {})}
            messages.append(message)
        return messages

    def _content(self, turn: Turn) -> str | list[dict[str, str]]:
        if not self._in_parts[turn.role]:
            return turn.text.replace(IMAGE_MARK, self.placeholder) if turn.role == "user" else turn.text
        content: list[dict[str, str]] = []
        pieces = turn.text.split(IMAGE_MARK) if turn.role == "user" else [turn.text]
        for i, piece in enumerate(pieces):
            # LLaVA's files put a line break beside a mark; the template writes its own.
            text = piece.lstrip("\n") if i > 0 else piece
            text = text.rstrip("\n") if i < len(pieces) - 1 else text
            content += [{"type": "image"}] if i > 0 else []
            content += [{"type": "text", "text": text}] if text else []
        return content or ""

    def _render(
        self, messages: list[Message], add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        try:
            return self._processing.render(messages, add_generation_prompt, tools or None)
        except _OF_TEMPLATES as error:
            raise ChatError(f"template refuses the conversation: {str(error).strip()[:200]}") from error

    def _trial(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        """The text of a trial; '' where the template refuses it. Raises ChatError where it exceeds a limit."""
        try:
            return self._render(messages, tools=tools)
        except ChatError as error:
            if isinstance(error.__cause__, TemplateLimitError):  # it would in every trial, for seconds each
                raise
            return ""

    @cached_property
    def _reasoning_key(self) -> str | None:
        """Key of a message under which the template reads an assistant's reasoning; None if it reads none."""
        question, answer = self._messages(TRIAL_TURNS[:2])
        for key in ("reasoning_content", "reasoning", "thinking"):
            if _REASONING in self._trial([question, {**answer, key: _REASONING}]):
                return key
        return None

    @property
    def reads_reasoning(self) -> bool:
        """Whether the template has a place for the reasoning of an assistant turn."""
        return self._reasoning_key is not None

    @cached_property
    def _takes_tools(self) -> bool:
        return _TOOL in self._trial(self._messages(TRIAL_TURNS[:1]), _tools(_TRIAL_TOOLS))

    @cached_property
    def _takes_calls(self) -> bool:
        return _TOOL in self._trial(self._messages(_TRIAL_CALL[:2]))

    @cached_property
    def _takes_results(self) -> bool:
        """Whether a tool's turn is written; its layout is found on the way."""
        for in_parts in (True, False):
            self._in_parts["tool"] = in_parts
            for turns in (_TRIAL_CALL, (*TRIAL_TURNS[:1], _TRIAL_CALL[-1])):
                text = self._trial(self._messages(turns))
                if SECOND_ANSWER in text and not _shows_parts(text):
                    return True
        return False

    def _learn_layout(self) -> None:
        """Find out whether the template takes each role's content as parts or as a string."""
        wanted: dict[Role, list[Turn]] = {
            "user": [Turn("user", QUESTION)],
            "assistant": [Turn("user", QUESTION), Turn("assistant", ANSWER)],
            "system": [Turn("system", SECOND_ANSWER), Turn("user", QUESTION)],
        }
        for role, turns in wanted.items():
            if not self._understands(role, turns):
                self._in_parts[role] = False
                if not self._understands(role, turns) and role != "system":  # an error only where a system turn occurs
                    self.write(turns)
                    raise ChatError(f"template loses text: a turn of the {role} is not written")

    def _understands(self, role: Role, turns: list[Turn]) -> bool:
        text = self._trial(self._messages(turns))
        return next(turn.text for turn in turns if turn.role == role) in text and not _shows_parts(text)

    def _learn_placeholder(self) -> str:
        if not self._in_parts["user"]:
            token = getattr(self._processing.processor, "image_token", None)
            if not isinstance(token, str):
                raise ChatError("no image placeholder: neither the template nor the processor has one")
            return token
        with_image = self.write([Turn("user", IMAGE_MARK + QUESTION)])
        without = self.write([Turn("user", QUESTION)])
        for head_first in (True, False):
            added = _inserted(with_image, without, head_first)
            if self._special.search(added):
                return added
        raise ChatError("template loses pictures: it writes no placeholder for one")

    def _refuse_reserved(self, named: Sequence[str]) -> None:
        """Refuse to allow a token in texts that no tokenizer has, or that would be read as more than text."""
        if not named:
            return
        known, reserved = self._processing.added_tokens, self._reserved()
        for token in named:
            if token not in known:
                why = "The model's tokenizer has no special token of that name."
            elif token in reserved:
                why = "It structures conversations: a text with it could pose as another turn or picture."
            else:
                continue
            allowed = sorted(self._processing.special_tokens - reserved)
            fix = f"Name some of: {', '.join(allowed[:20])}." if allowed else "Leave the option out."
            raise UserError(f"data.special_tokens cannot allow {token!r}.", why, fix)

    def _reserved(self) -> set[str]:
        """Special tokens that structure a conversation: all that trial texts contain, and those named for a purpose."""
        texts = [
            self.placeholder,
            self.write(TRIAL_TURNS, True),
            self._trial(self._messages([Turn("system", SECOND_ANSWER), *TRIAL_TURNS])),
            self._trial(self._messages([Turn("user", IMAGE_MARK + QUESTION)])),
            self._trial(self._messages(_TRIAL_CALL), _tools(_TRIAL_TOOLS)),
        ]
        written = {token for token in self._processing.special_tokens if any(token in text for text in texts)}
        return written | self._processing.named_tokens


def tool_calls(turn: Turn) -> list[dict[str, Any]]:
    """The calls of a turn in the form that templates take: ``{"type", "function": {"name", "arguments": {...}}}``.

    Args:
        turn: A turn; one without calls gives an empty list.

    Raises:
        ChatError: They are not a JSON list of calls with names.
    """
    calls = []
    for call in _json_list(turn.tool_calls, "tool calls"):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ChatError("tool calls: one has no function name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise ChatError("tool calls: the arguments of one are not JSON") from None
        identifier = {"id": call["id"]} if "id" in call else {}
        calls.append({**identifier, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _tools(text: str) -> list[Any]:
    return _json_list(text, "tools")


def _json_list(text: str, what: str) -> list[Any]:
    try:
        value = json.loads(text) if text else []
    except ValueError:
        value = None
    if not isinstance(value, list):
        raise ChatError(f"{what}: not a JSON list")
    return value


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of these texts, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _shows_parts(text: str) -> bool:
    """Whether a list of parts was printed as it is."""
    return re.search(r"""['"]type['"]: ?['"]text""", text) is not None


def _inserted(longer: str, shorter: str, head_first: bool) -> str:
    """The middle part that ``longer`` has in addition; where ambiguous, the common part is matched at one end first."""
    head, tail = common_length(longer, shorter), common_length(longer[::-1], shorter[::-1])
    if head_first:
        tail = min(tail, len(shorter) - head)
    else:
        head = min(head, len(shorter) - tail)
    return longer[head : len(longer) - tail].strip()


def common_length(a: str, b: str) -> int:
    """Length of the common prefix of two texts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
