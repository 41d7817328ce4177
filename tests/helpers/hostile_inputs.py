"""How many hostile inputs a test tries: a few, or as many as ``LIGHTNING_MM_HOSTILE=SEED:COUNT`` says."""

import os


def cases(count: int) -> tuple[int, int]:
    """(seed, number of cases).

    Args:
        count: Cases where the variable is not set.
    """
    seed, _, asked = os.environ.get("LIGHTNING_MM_HOSTILE", "0:").partition(":")
    return int(seed), int(asked or count)
