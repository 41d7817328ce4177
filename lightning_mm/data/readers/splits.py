"""Which split of a dataset an option stands for.

Data flow: the splits that a dataset has, and the option (or ``Source.split``) -> ``choose_split`` -> one of them.
"""

from collections.abc import Collection

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError

_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "eval", "minival", "testmini", "test"),
    "test": ("test", "testing", "eval"),
    "predict": ("predict", "test"),
}


def choose_split(where: str, splits: Collection[str], option: str, named: str | None) -> str:
    """The split that is read.

    Args:
        where: The dataset, for messages.
        splits: Splits that it has.
        option: What they are for: train, validation, test or predict.
        named: The split that the user named; None to choose.

    Raises:
        UserError: The dataset does not have it, or several may be meant.
    """
    listed = ", ".join(map(str, splits))
    if named is not None:
        if named in splits:
            return named
        raise UserError(f"{where} has no split {named!r}.", f"Its splits are {listed}.", "Name one of these as split.")
    for name in _ALIASES.get(option, (option,)):
        if found := [split for split in splits if split.casefold() == name]:
            if len(splits) > 1:
                log_decision(f"data.split.{where}", found[0], f"{option} is wanted, and its splits are {listed}")
            return found[0]
    raise UserError(
        f"{where} has no split for {option}.", f"Its splits are {listed}.", "Name the one that is meant as split."
    )
