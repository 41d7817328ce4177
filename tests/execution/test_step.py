"""How a step is computed: options that cannot be are refused; the command line takes those that can."""

import pytest

from lightning_mm.core.errors import UserError
from lightning_mm.execution.prepare import Compute


@pytest.mark.parametrize("option", ["loss_chunk", "checkpoint_every"])
def test_what_counts_from_one(option: str) -> None:
    with pytest.raises(UserError, match=rf"model\.compute\.{option}: 0 is out of range"):
        Compute(**{option: 0})
    assert getattr(Compute(**{option: 1}), option) == 1
