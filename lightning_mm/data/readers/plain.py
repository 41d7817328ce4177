"""Values of tables as JSON can hold them.

Data flow: a cell that Arrow or ``datasets`` decoded -> ``as_plain`` -> a JSON value, without pictures' bytes.
"""

import datetime
import decimal
import math
from collections.abc import Mapping
from typing import Any


def as_plain(value: Any) -> Any:
    """The value as JSON holds it: bytes become None, dates and other objects text, and NaN None."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): as_plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(each) for each in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return None
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value)
