"""Which tokens give to which through attention: the ways that an answer can take, by the names of token classes.

Data flow: ``Asked`` + a name such as ``image->question`` -> ``Edge`` -> measured by ``attention``, cut by ``knockout``.

Shapes: T targets (tokens that attend), S sources (tokens that are attended to).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mm.causal.questions import Asked
from lightning_mm.errors import UserError

CLASSES = ("image", "question", "constraint", "last")


@dataclass(frozen=True, eq=False)
class Edge:
    """From some tokens to others.

    Args:
        name: As told in tables and errors.
        targets: (T,) positions of the tokens that attend.
        sources: (S,) positions of the tokens that they attend to.
        of_picture: Whether the sources are the picture: then they are also every key of a layer that attends to the
            picture's own states instead of the tokens (cross-attention).
    """

    name: str
    targets: Tensor
    sources: Tensor
    of_picture: bool = False

    def __bool__(self) -> bool:
        """Whether there is anything at both ends."""
        return len(self.targets) > 0 and len(self.sources) > 0


def edge(asked: Asked, name: str) -> Edge:
    """An edge of one question.

    Args:
        asked: The question.
        name: ``source->target``, both of ``CLASSES``; ``question`` is all of its tokens, the constraint's among them.
            An end that the question does not have (no picture, no constraint) is empty.

    Raises:
        UserError: There is no such class, or the edge is ``last->last``: a token always sees itself.
    """
    check(name)
    source, _, target = name.partition("->")
    return Edge(name, _tokens(asked, target), _tokens(asked, source), source == "image")


def check(name: str) -> None:
    """Raises UserError if there is no such edge."""
    source, _, target = name.partition("->")
    if source not in CLASSES or target not in CLASSES or (source, target) == ("last", "last"):
        raise UserError(
            f"There is no edge {name!r}.",
            "A token never loses sight of itself." if name == "last->last" else "Edges are named source->target.",
            f"Give two of {', '.join(CLASSES)}, image->question for example.",
        )


def _tokens(asked: Asked, name: str) -> Tensor:
    if name == "last":
        return torch.tensor([asked.length - 1])
    return {"image": asked.image, "question": asked.text, "constraint": asked.constraint}[name].unique()
