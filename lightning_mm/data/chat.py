"""A conversation in the model's own chat template, and which tokens of it are learned.

Learned is exactly what the model would generate: for each assistant turn that trains, the text that the template writes
for it after its generation prompt, up to the last stop token, without the line break that follows. Templates do not
mark answers, so each is located by rendering up to it: the text of the turns before with the generation prompt must be
a prefix of the whole text. Where a template writes no stop token, the tokenizer's EOS token is inserted.

Templates of models that reason write a turn in two ways. The last answer has its reasoning, or an empty place for it;
answers before the last question have not. Such an earlier answer is not what would be generated at its place, so it is
context, and counted (``Rendered.num_context``); a row for each answer trains all of them. Where the generation prompt
opens the place for reasoning and the template writes none for an answer without, the answer begins before that opening.

The processor then changes the text only by expanding image placeholders, so the pieces between them are found again in
order. A piece with an answer also contains the headers of its turns, which no expansion contains.

Data flow: turns of a Sample -> ``ChatRenderer.render`` (text by ``chat_template``) -> ``Rendered`` (text, character
spans) -> processor -> ``locate_answer_spans`` (spans in the tokenized text) -> ``tokens_of_span`` -> ``collator``.

Shapes: L tokens of one row.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.chat_template import (
    ANSWER,
    TRIAL_TURNS,
    ChatTemplate,
    any_of,
    common_length,
    tool_calls,
)
from lightning_mm.data.chat_template import ChatError as ChatError
from lightning_mm.data.sample import IMAGE_MARK, Turn
from lightning_mm.models.processor import ModelProcessor

_THINK = re.compile("think", re.IGNORECASE)
_THINK_MARKS = re.compile(r"</?think>|◁/?think▷")


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation.

    Args:
        text: Text with one placeholder per image.
        spans: First character and one past the last of each learned answer with its stop token, in order.
        num_context: Number of answers that should train and are context only, since the template writes them otherwise
            than the model generates them.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    num_context: int = 0


class ChatRenderer:
    """Renders conversations with a model's chat template and locates their answers.

    Args:
        processing: The model's processor.
        special_tokens: Special tokens that texts may contain nevertheless, such as ``<|box_start|>``; () for none.

    Raises:
        UserError: The template cannot be used for training: it ignores images, or rewrites earlier turns; or a token of
            ``special_tokens`` cannot be allowed.

    Attributes:
        placeholder: Text that the template writes for an image.
    """

    def __init__(self, processing: ModelProcessor, special_tokens: Sequence[str] = ()) -> None:
        self._processing = processing
        self._stop = any_of(processing.added_tokens)
        self._head, self._tail, self._has_stop, self._opening = 0, "", True, ""
        try:
            self._template = ChatTemplate(processing, special_tokens)
            self.placeholder = self._template.placeholder
            self._learn_answer()
            if self.render(TRIAL_TURNS).num_context and not self._thinks():
                raise ChatError("template rewrites turns: in front of later turns an answer is not what it was without")
        except ChatError as error:
            raise UserError(
                "The model's chat template cannot be used to train.",
                f"{error}.",
                "Give the model folder a chat_template.jinja that writes each turn independently of later ones, and a "
                "placeholder for each picture.",
            ) from error

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False, tools: str = "") -> Rendered:
        """The rendered conversation with the spans of its answers.

        Args:
            turns: Messages with one ``<image>`` mark per image.
            add_generation_prompt: Whether the text ends with the header of an assistant turn.
            tools: Tools that the assistant may call, as a JSON list; '' for none.

        Raises:
            ChatError: The template refuses or loses a part of it, or a turn contains a special token.
        """
        self._template.check(turns, tools)
        return self._located(turns, add_generation_prompt, tools, frozenset())

    def _located(
        self, turns: Sequence[Turn], add_generation_prompt: bool, tools: str, ended: frozenset[int]
    ) -> Rendered:
        """The rendered conversation; the text of turns in ``ended`` holds a stop token already."""
        full = self._template.write(turns, add_generation_prompt, tools)
        num_images = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
        if full.count(self.placeholder) != num_images:
            raise ChatError(f"template loses pictures: {full.count(self.placeholder)} of {num_images} are written")
        text, done = "", 0
        spans: list[Span] = []
        context = set()
        for i, turn in enumerate(turns):
            if turn.role != "assistant" or i in ended or (self._has_stop and not turn.train):
                continue
            is_last = i + 1 == len(turns) and not add_generation_prompt
            alone = full if is_last else self._template.write(turns[: i + 1], False, tools)
            start = self._answer_start(self._template.write(turns[:i], True, tools), alone)
            stop = start + self._answer_end(alone[start:], turn)
            if not full.startswith(alone):
                context.add(i)
                continue
            if turn.train:
                spans.append((len(text) + start - done, len(text) + stop - done + len(self._missing_stop)))
            text += full[done:stop] + self._missing_stop
            done = stop
        if context and not self._has_stop:
            # Where such an answer ends cannot be told from a text in which nothing marks it.
            if any(turns[i].tool_calls for i in context):
                raise ChatError("template rewrites turns: an earlier call of a tool, and marks no end of it")
            marked = [replace(t, text=t.text + self._missing_stop) if i in context else t for i, t in enumerate(turns)]
            return self._located(marked, add_generation_prompt, tools, ended | context)
        num_context = sum(turns[i].train for i in context | ended)
        return Rendered(text + full[done:], tuple(spans), num_context)

    def render_unmarked(self, turns: Sequence[Turn], tools: str = "") -> str:
        """Text with as many tokens as the rendered conversation, without locating answers (faster).

        Args:
            turns: Messages with one ``<image>`` mark per image.
            tools: Tools that the assistant may call, as a JSON list; '' for none.

        Raises:
            ChatError: The template refuses it.
        """
        return self._template.write(turns, False, tools) + self._missing_stop * sum(
            t.role == "assistant" for t in turns
        )

    @property
    def _missing_stop(self) -> str:
        """What ends an answer besides the template's own text: the EOS token, or nothing."""
        if self._has_stop:
            return ""
        eos = self._processing.eos_token
        if eos is None:
            raise ChatError("no stop token: neither the template nor the tokenizer has one")
        return eos

    def _answer_start(self, prompt: str, alone: str) -> int:
        """Where an answer begins in the conversation that ends with it, whose prompt for generation is ``prompt``."""
        header = prompt.removesuffix(self._opening)
        for before in (prompt, header):
            if alone.startswith(before):
                return len(before)
        raise ChatError("template rewrites turns: after its generation prompt the text is not what it was without")

    def _answer_end(self, segment: str, turn: Turn) -> int:
        """End of the answer in what follows its prompt: after its last stop token, or before the template's tail."""
        at = self._end_of_words(segment, turn)
        if not self._has_stop:
            return len(segment) - len(self._tail) if segment.endswith(self._tail) else at
        stops = list(self._stop.finditer(segment, at))
        if not stops:
            raise ChatError(f"template changes an answer: no stop token after {turn.text[:60]!r}")
        return stops[-1].end()

    def _end_of_words(self, segment: str, turn: Turn) -> int:
        """End of all that a turn says and calls, which must stand in the segment in this order."""
        at = 0
        for number, said in enumerate(self._parts(turn, segment)):
            first = self._head if number == 0 and not turn.reasoning else at
            places = ((_find(segment, each, first, at), len(each)) for each in (said, said.strip()))
            at = next((place + length for place, length in places if place >= 0), -1)
            if at < 0:
                raise ChatError(f"template changes an answer: {said[:60]!r} became {segment[:60]!r}")
        for call in tool_calls(turn):
            name = call["function"]["name"]
            if name not in segment:
                raise ChatError(f"template changes an answer: the call of {name} is not written")
            at = max(at, segment.index(name) + len(name))
        return at

    def _parts(self, turn: Turn, text: str) -> list[str]:
        said = [turn.text]
        if turn.text.strip() not in text:  # reasoning within the answer, which the template takes apart
            said = [piece for piece in _THINK_MARKS.split(turn.text) if piece.strip()]
        return [turn.reasoning, *said] if turn.reasoning else said

    def _learn_answer(self) -> None:
        """Find out where an answer begins and ends in its segment, and whether the template writes a stop token."""
        prompt, alone = self._template.write(TRIAL_TURNS[:1], True), self._template.write(TRIAL_TURNS[:2])
        if not alone.startswith(prompt):
            header = common_length(prompt, alone)
            self._opening = prompt[header:]
            added = prompt[common_length(prompt, self._template.write(TRIAL_TURNS[:1])) :]
            if not _THINK.search(added):
                raise ChatError(
                    "template rewrites turns: after its generation prompt the text is not what it was without"
                )
            log_decision(
                "data.generation_prompt",
                f"answers are learned without {self._opening!r}",
                "the chat template writes them without what its generation prompt ends with",
            )
        segment = alone[self._answer_start(prompt, alone) :]
        self._head = max(0, segment.find(ANSWER))
        self._tail = segment[self._head + len(ANSWER) :]
        self._has_stop = self._stop.search(self._tail) is not None
        if not self._has_stop:
            log_decision(
                "data.stop_token", self._missing_stop, "the tokenizer's eos: the chat template ends no answer itself"
            )

    def _thinks(self) -> bool:
        """Whether the template has a place for reasoning, so that it may write earlier answers without one."""
        texts = (self._template.write(TRIAL_TURNS[:1], True), self._template.write(TRIAL_TURNS[:2]))
        return self._template.reads_reasoning or any(_THINK.search(text) for text in texts)


def without_reasoning(generated: str) -> str:
    """What a generated text answers after its reasoning, whose beginning may be in the prompt.

    Args:
        generated: New text of a model.

    Example:
        >>> without_reasoning("It has whiskers.</think> A cat.")
        'A cat.'
    """
    return re.split(r"</think>|◁/think▷", generated)[-1].strip()


def _find(text: str, said: str, first: int, at: int) -> int:
    return first if text.startswith(said, first) else text.find(said, at)


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
