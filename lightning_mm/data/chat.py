"""A conversation in the model's own chat template, and which tokens of it are answers.

Templates do not mark answers, so each is located by rendering up to it: the text of the turns before with the
generation prompt must be a prefix of the whole text, and the answer's span starts after it. The span ends with the last
stop token that the template writes after the answer, without the line break that follows. Where a template writes no
stop token, the tokenizer's EOS token is inserted.

The processor then changes the text only by expanding image placeholders, so the pieces between them are found again in
order. A piece with an answer also contains the headers of its turns, which no expansion contains.

Data flow: turns of a Sample -> ``ChatRenderer.render`` -> ``Rendered`` (text, character spans) -> processor ->
``locate_answer_spans`` (spans in the tokenized text) -> ``tokens_of_span`` -> ``collator``.

Shapes: L tokens of one row.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2.exceptions import TemplateError
from torch import Tensor

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.sample import IMAGE_MARK, Role, Turn
from lightning_mm.models.processor import Message, Processing

_FIRST_QUESTION, _FIRST_ANSWER, _SECOND_QUESTION, _SECOND_ANSWER = (
    "Lorem ipsum",
    "dolor sit",
    "amet consectetur",
    "adipiscing elit",
)
_TRIAL_TURNS = (
    Turn("user", _FIRST_QUESTION),
    Turn("assistant", _FIRST_ANSWER),
    Turn("user", _SECOND_QUESTION),
    Turn("assistant", _SECOND_ANSWER),
)


class ChatError(ValueError):
    """Why a conversation cannot be rendered with this template, as ``category: detail``."""


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation.

    Args:
        text: Text with one placeholder per image.
        spans: First character and one past the last of each answer with its stop token, one per assistant turn.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatRenderer:
    """Renders conversations with a model's chat template, whose properties it finds by trial renderings.

    Args:
        processing: The model's processor.

    Raises:
        UserError: The template cannot be used for training: it ignores images, or rewrites earlier turns.

    Attributes:
        placeholder: Text that the template writes for an image.
    """

    def __init__(self, processing: Processing) -> None:
        self._processing = processing
        self._special = _any_of(processing.special_tokens)
        self._stop = _any_of(processing.added_tokens)
        self._in_parts: dict[Role, bool] = {"user": True, "assistant": True, "system": True}
        self._head, self._has_stop = 0, True
        self.placeholder = ""
        try:
            self._learn_layout()
            self.placeholder = self._learn_placeholder()
            self._learn_answer()
            self.render(_TRIAL_TURNS)
        except ChatError as error:
            raise UserError(
                "The model's chat template cannot be used to train.",
                f"{error}.",
                "Give the model folder a chat_template.jinja that writes each turn independently of later ones, and a "
                "placeholder for each picture.",
            ) from error

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> Rendered:
        """The rendered conversation with the spans of its answers.

        Args:
            turns: Messages with one ``<image>`` mark per image.
            add_generation_prompt: Whether the text ends with the header of an assistant turn.

        Raises:
            ChatError: The template refuses it or changes an answer, or a turn contains a special token.
        """
        self._refuse_special(turns)
        full = self._raw(turns, add_generation_prompt)
        num_images = sum(turn.text.count(IMAGE_MARK) for turn in turns)
        if full.count(self.placeholder) != num_images:
            raise ChatError(f"template loses pictures: {full.count(self.placeholder)} of {num_images} are written")
        text, done, spans = "", 0, []
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            start = self._prefix(full, turns[:i], True)
            is_last = i + 1 == len(turns) and not add_generation_prompt
            end = len(full) if is_last else self._prefix(full, turns[: i + 1], False)
            stop, has_stop = self._answer_end(full[start:end], turn.text)
            text += full[done:start]
            spans.append((len(text), len(text) + stop + (0 if has_stop else len(self._eos()))))
            text += full[start : start + stop] + ("" if has_stop else self._eos())
            done = start + stop
        return Rendered(text + full[done:], tuple(spans))

    def render_unmarked(self, turns: Sequence[Turn]) -> str:
        """Text with as many tokens as the rendered conversation, without locating answers (faster).

        Args:
            turns: Messages with one ``<image>`` mark per image.

        Raises:
            ChatError: The template refuses it.
        """
        answers = sum(turn.role == "assistant" for turn in turns)
        return self._raw(turns) + ("" if self._has_stop else self._eos() * answers)

    def _prefix(self, full: str, turns: Sequence[Turn], add_generation_prompt: bool) -> int:
        """Length of the text of ``turns``, which must be a prefix of ``full``."""
        text = self._raw(turns, add_generation_prompt)
        if not full.startswith(text):
            what = "after its generation prompt" if add_generation_prompt else "in front of later turns"
            raise ChatError(f"template rewrites turns: {what} the text is not what it was without")
        return len(text)

    def _answer_end(self, segment: str, answer: str) -> tuple[int, bool]:
        """End of the answer's last stop token in its segment and True, or end of the answer and False."""
        for text in (answer, answer.strip()):
            at = self._head if segment.startswith(text, self._head) else segment.find(text)
            if at >= 0:
                end = at + len(text)
                stops = list(self._stop.finditer(segment, end))
                return (stops[-1].end(), True) if stops else (end, False)
        raise ChatError(f"template changes an answer: {answer[:60]!r} became {segment[:60]!r}")

    def _eos(self) -> str:
        eos = self._processing.eos_token
        if eos is None:
            raise ChatError("no stop token: neither the template nor the tokenizer has one")
        return eos

    def _raw(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        try:
            return self._processing.render([self._message(turn) for turn in turns], add_generation_prompt)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise ChatError(f"template refuses the conversation: {str(error).strip()[:200]}") from error

    def _message(self, turn: Turn) -> Message:
        if not self._in_parts[turn.role]:
            return {"role": turn.role, "content": turn.text.replace(IMAGE_MARK, self.placeholder)}
        content: list[dict[str, str]] = []
        pieces = turn.text.split(IMAGE_MARK)
        for i, piece in enumerate(pieces):
            # LLaVA's files put a line break beside a mark; the template writes its own.
            text = piece.lstrip("\n") if i > 0 else piece
            text = text.rstrip("\n") if i < len(pieces) - 1 else text
            content += [{"type": "image"}] if i > 0 else []
            content += [{"type": "text", "text": text}] if text else []
        return {"role": turn.role, "content": content}

    def _refuse_special(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            text = turn.text.replace(IMAGE_MARK, "") if turn.role == "user" else turn.text
            if found := self._special.search(text):
                raise ChatError(f"special token in the text: the {turn.role} says {found.group()!r}")

    def _learn_layout(self) -> None:
        """Find out whether the template takes each role's content as parts or as a string."""
        wanted: dict[Role, list[Turn]] = {
            "user": [Turn("user", _FIRST_QUESTION)],
            "assistant": [Turn("user", _FIRST_QUESTION), Turn("assistant", _FIRST_ANSWER)],
            "system": [Turn("system", _SECOND_ANSWER), Turn("user", _FIRST_QUESTION)],
        }
        for role, turns in wanted.items():
            if not self._understands(role, turns):
                self._in_parts[role] = False
                if not self._understands(role, turns) and role != "system":  # an error only where a system turn occurs
                    self._raw(turns)
                    raise ChatError(f"template loses text: a turn of the {role} is not written")

    def _understands(self, role: Role, turns: list[Turn]) -> bool:
        try:
            text = self._raw(turns)
        except ChatError:
            return False
        said = next(turn.text for turn in turns if turn.role == role)
        return said in text and "'type'" not in text and '"type"' not in text

    def _learn_placeholder(self) -> str:
        if not self._in_parts["user"]:
            token = getattr(self._processing.processor, "image_token", None)
            if not isinstance(token, str):
                raise ChatError("no image placeholder: neither the template nor the processor has one")
            return token
        with_image = self._raw([Turn("user", IMAGE_MARK + _FIRST_QUESTION)])
        without = self._raw([Turn("user", _FIRST_QUESTION)])
        for head_first in (True, False):
            added = _inserted(with_image, without, head_first)
            if self._special.search(added):
                return added
        raise ChatError("template loses pictures: it writes no placeholder for one")

    def _learn_answer(self) -> None:
        """Find out where an answer begins in its segment, and whether the template ends it with a stop token."""
        full = self._raw(_TRIAL_TURNS[:2])
        segment = full[self._prefix(full, _TRIAL_TURNS[:1], True) :]
        self._head = max(0, segment.find(_FIRST_ANSWER))
        self._has_stop = self._answer_end(segment, _FIRST_ANSWER)[1]
        if not self._has_stop:
            log_decision("data.stop_token", self._eos(), "the tokenizer's eos: the chat template ends no answer itself")


def _any_of(texts: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _inserted(longer: str, shorter: str, head_first: bool) -> str:
    """The middle part that ``longer`` has in addition; where ambiguous, the common part is matched at one end first."""
    head, tail = _common(longer, shorter), _common(longer[::-1], shorter[::-1])
    if head_first:
        tail = min(tail, len(shorter) - head)
    else:
        head = min(head, len(shorter) - tail)
    return longer[head : len(longer) - tail].strip()


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


Span = tuple[int, int]


def locate_answer_spans(rendered: Rendered, placeholder: str, text: str) -> list[Span]:
    """Spans of the answers in the tokenized text.

    Args:
        rendered: Text and spans before placeholders were expanded.
        placeholder: Text of one image in ``rendered``.
        text: Text after the expansion.

    Raises:
        UserError: The processor changed more than the placeholders.
    """
    pieces = rendered.text.split(placeholder)
    befores = [0]
    for piece in pieces[:-1]:
        befores.append(befores[-1] + len(piece) + len(placeholder))
    afters = _locate_pieces(pieces, text)
    spans = []
    for start, end in rendered.spans:
        number = bisect_right(befores, start) - 1
        shift = afters[number] - befores[number]
        spans.append((start + shift, end + shift))
        assert text[start + shift : end + shift] == rendered.text[start:end], "a span does not hold its answer"
    return spans


def _locate_pieces(pieces: list[str], text: str) -> list[int]:
    """Start of each piece: the first at the beginning, the last at the end, the others in order between them."""
    last = len(text) - len(pieces[-1])
    starts = [0]
    for piece in pieces[1:-1]:
        starts.append(text.find(piece, starts[-1] + len(pieces[len(starts) - 1]), last))
    starts += [last] if len(pieces) > 1 else []
    if min(starts) < 0 or not text.startswith(pieces[0]) or not text.endswith(pieces[-1]):
        raise UserError(
            "The model's processor rewrites the text, so that answers cannot be found in it again.",
            f"It was given {_short(''.join(pieces))!r} and tokenized {_short(text)!r}.",
            "Choose a model whose processor changes the image placeholders only.",
        )
    return starts


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:80]}...{text[-80:]}"


def tokens_of_span(span: Span, offsets: Tensor) -> range:
    """Range of the tokens that contain any character of a span.

    Args:
        span: First character and one past the last.
        offsets: (L, 2) first character and one past the last of each token.
    """
    start, end = span
    inside = ((offsets[:, 0] < end) & (offsets[:, 1] > start)).nonzero()
    return range(int(inside[0]), int(inside[-1]) + 1) if len(inside) else range(0)
