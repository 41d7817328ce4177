"""Why a row cannot be used, and the checks of single values that say so.

Data flow: the readers of files and shapes raise ``InvalidRow`` -> ``source`` makes a ``Rejection`` of it.
"""

from typing import Any

BESIDE_THE_ROWS = (
    "missing image", "image outside the image root", "impossible image path", "image not fetched", "video not fetched",
)  # fmt: skip
"""Categories of reasons that lie beside the file with the rows, so that they may be gone at the next start."""


class InvalidRow(ValueError):
    """Why a row cannot be used, as ``category: detail``, by which rejections are counted."""


def require_text(value: object, key: str) -> str:
    """The value, if it is text.

    Args:
        value: Of a row or a turn.
        key: Its name, for the reason.

    Raises:
        InvalidRow: It is something else.
    """
    if not isinstance(value, str):
        raise InvalidRow(f"wrong type: {key!r} is {kind_of(value)}, not text")
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return {dict: "an object", list: "a list", str: "text", type(None): "missing"}.get(type(value), f"{value!r:.40}")
