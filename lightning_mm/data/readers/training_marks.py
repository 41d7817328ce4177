"""What a row or a turn says of its own training: whether it is learned, and with which weight.

Data flow: a row or a turn -> ``read_train_mark`` -> learned, context only, or nothing said; ``InvalidRow`` for what
cannot be obeyed. A row with a rejected answer is refused by ``refuse_preference``.
"""

from collections.abc import Mapping
from typing import Any

from lightning_mm.data.readers.invalid_row import InvalidRow

TRAIN_KEYS = (
    "loss", "train", "weight", "loss_weight", "loss_scale", "sample_weight", "loss_mask", "trainable", "training",
    "train_on_turn", "is_trainable", "do_train", "calculate_loss", "compute_loss",
)  # fmt: skip
"""Keys by which a turn, or a row, says whether it is learned: 0 and false are not, 1 and true are."""
_UNCLEAR = ("mask", "masked", "ignore", "no_loss", "ignore_loss", "train_detail", "labels_mask")
_MARKS = frozenset(TRAIN_KEYS + _UNCLEAR)
_WORDS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False, "yes": True, "no": False}
_REJECTED = (
    "non_preferred_output",
    "rejected",
    "rejected_response",
    "rejected_images",
    "rejected_messages",
    "ranking",
    "margin",
)
_SUPERVISED = "supervised fine-tuning has no use for a rejected answer"


def read_train_mark(given: Mapping[str, Any], what: str) -> bool | None:
    """Whether a turn or a row says that it is learned; None if it says nothing.

    Args:
        given: The turn or the row.
        what: What it is called in reasons.

    Raises:
        InvalidRow: It gives a weight other than 0 and 1, two that differ, or one whose meaning is not clear.
    """
    if _MARKS.isdisjoint(given):
        return None
    unclear = next((key for key in _UNCLEAR if given.get(key) is not None), "")
    if unclear and (what == "turn" or isinstance(given[unclear], (bool, int, float))):  # a row's may be a picture
        raise InvalidRow(
            f"unclear training mark: {unclear!r} of the {what} may mean learned or left out; use 'loss': true or "
            "false, or drop it"
        )
    said = {key: mark for key in TRAIN_KEYS if (mark := _mark(given.get(key), key, what)) is not None}
    if len(set(said.values())) > 1:
        raise InvalidRow(f"training marks differ: {', '.join(f'{key} is {mark}' for key, mark in said.items())}")
    return next(iter(said.values()), None)


def _mark(value: Any, key: str, what: str) -> bool | None:
    if isinstance(value, str):
        if what == "turn" and value.strip() and value.strip().casefold() not in _WORDS:
            raise InvalidRow(
                f"unclear training mark: {key!r} of the turn is {value!r:.40}; use true or false, or drop it"
            )
        value = _WORDS.get(value.strip().casefold())  # other words, such as the name of a split, say nothing of it
    if isinstance(value, list) and what == "turn":
        raise InvalidRow(f"training weight: {key!r} of the turn is a list, only 0 and 1 for a whole turn are obeyed")
    if not isinstance(value, (bool, int, float)):
        return None
    if value not in (0, 1):
        raise InvalidRow(
            f"training weight: {key!r} of the {what} is {value:g}, only 0 (context) and 1 (learned) are obeyed; drop "
            f"the key if it means something else"
        )
    return bool(value)


def refuse_preference(row: Mapping[str, Any], response_named: bool) -> None:
    """Refuse a row that compares answers.

    Args:
        row: The row.
        response_named: Whether the user named the answer's column, and so which of them is learned.

    Raises:
        InvalidRow: It has a rejected answer, or says whether its answer is wanted.
    """
    if response_named:
        return
    if rejected := next((key for key in _REJECTED if row.get(key) not in (None, "", []) and _compares(row, key)), None):
        chosen = next((key for key in ("chosen", "chosen_response") if row.get(key) is not None), None)
        fix = f"; to learn {chosen!r} alone, name it: columns response={chosen}" if chosen else ""
        raise InvalidRow(f"preference row: it has {rejected!r}, and {_SUPERVISED}{fix}")
    if row.get("chosen") is not None and isinstance(row["chosen"], (str, list, dict)):
        raise InvalidRow("preference row: it has 'chosen'; to learn it alone, name it: columns response=chosen")
    for key in ("label", "kto_tag", "desirable"):
        if isinstance(row.get(key), bool):
            raise InvalidRow(
                f"preference row: {key!r} says whether the answer is wanted (KTO), and {_SUPERVISED}; keep the rows "
                f"where it is true, without {key!r}"
            )


def _compares(row: Mapping[str, Any], key: str) -> bool:
    """Whether a key is about answers here: 'margin' and 'ranking' are words of other data too."""
    return key.startswith(("rejected", "non_preferred")) or any(
        other in row for other in ("chosen", "rejected", "responses")
    )
