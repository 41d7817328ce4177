"""Lists and objects that a cell of a table holds as text: JSON, or Python's way of printing them.

Data flow: text of a cell -> ``list_of`` or ``value_of`` -> the value, or None where it is just text.
"""

import ast
import io
import json
import tokenize
import warnings
from typing import Any


def list_of(text: str) -> list[Any] | None:
    """The list that a text writes; None if it writes none."""
    value = value_of(text)
    return value if isinstance(value, list) else None


def value_of(text: str) -> Any:
    """The list or object that a text writes, as JSON or as Python prints it (a cell of ``DataFrame.to_csv``).

    Args:
        text: Text of a cell.

    Returns:
        The value; None if the text writes no list and no object, or does not say where one element ends.

    Example:
        >>> value_of('["a", "b"]'), value_of("['a', 'b']"), value_of("['a' 'b']"), value_of("[sic]")
        (['a', 'b'], ['a', 'b'], None, None)
    """
    text = text.strip()
    if text[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > 1_000_000:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of LaTeX's backslashes, which stay as they are
            tree = ast.parse(text, mode="eval")
        value = ast.literal_eval(tree)
        # NumPy prints lists without commas: Python would read neighboring texts as one.
        written = sum(token.type == tokenize.STRING for token in tokenize.generate_tokens(io.StringIO(text).readline))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError):
        return None
    read = sum(isinstance(node, ast.Constant) and isinstance(node.value, str) for node in ast.walk(tree))
    return value if read == written else None
