"""Settings that are one of a few words: what the command line's parser refuses is refused in Python too.

Data flow: a dataclass of settings -> ``refuse_other_choices`` in its ``__post_init__`` -> nothing, or a ``UserError``.
"""

import difflib
import types
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning_mm.core.errors import UserError


def refuse_other_choices(settings: Any, option: str) -> None:
    """Raise a ``UserError`` if a field that is typed as a ``Literal`` holds anything else.

    Args:
        settings: An object of a dataclass.
        option: Name of the settings in messages, such as 'model.backbone'.
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        choices, others = _choices(hints[field.name])
        value = getattr(settings, field.name)
        if not choices or value in choices or (others and not isinstance(value, str)):
            continue
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
        raise UserError(
            f"{option}.{field.name}: {value!r} is no choice.",
            f"Choices are {', '.join(choices)}.",
            f"Did you mean {near[0]}?" if near else "Choose one of them.",
        )


def _choices(hint: Any) -> tuple[list[str], bool]:
    """The words of a type, and whether it has values that are no words."""
    if get_origin(hint) is Literal:
        return [str(word) for word in get_args(hint)], False
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_choices(part) for part in get_args(hint)]
        if str in get_args(hint):
            return [], True
        return [word for words, _ in parts for word in words], True
    return [], True
