"""From characters of a rendered conversation to tokens of the batch.

Data flow: ``Rendered`` spans (image placeholders unexpanded) -> spans in the text that was tokenized -> token ranges.

A processor changes nothing but the placeholders, so the pieces between them are found again, in order. A piece that
holds an answer also holds the headers of its turns, which no expansion contains.

Shapes: L tokens of one row.
"""

from bisect import bisect_right

from torch import Tensor

from lightning_mm.data.chat import Rendered
from lightning_mm.errors import UserError

Span = tuple[int, int]


def expanded(rendered: Rendered, placeholder: str, text: str) -> list[Span]:
    """The answers' spans in the text that was tokenized.

    Args:
        rendered: The text before its placeholders were written out.
        placeholder: What stands for one picture.
        text: The text after.

    Raises:
        UserError: The processor changed more than the placeholders.
    """
    pieces = rendered.text.split(placeholder)
    befores = [0]
    for piece in pieces[:-1]:
        befores.append(befores[-1] + len(piece) + len(placeholder))
    afters = _found(pieces, text)
    spans = []
    for start, end in rendered.spans:
        number = bisect_right(befores, start) - 1
        shift = afters[number] - befores[number]
        spans.append((start + shift, end + shift))
        assert text[start + shift : end + shift] == rendered.text[start:end], "a span does not hold its answer"
    return spans


def _found(pieces: list[str], text: str) -> list[int]:
    """Where each piece begins: the first at the beginning, the last at the end, the others in order between them."""
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


def tokens(span: Span, offsets: Tensor) -> range:
    """The tokens that hold any character of a span.

    Args:
        span: First character and one past the last.
        offsets: (L, 2) characters of each token.
    """
    start, end = span
    inside = ((offsets[:, 0] < end) & (offsets[:, 1] > start)).nonzero()
    return range(int(inside[0]), int(inside[-1]) + 1) if len(inside) else range(0)
