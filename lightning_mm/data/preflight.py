"""A cheap look at every picture before a run begins: only its header is read, and only once.

Data flow: ``datamodule`` hands in Samples; those whose pictures are sound come back, the others are in the ledger.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_mm.data.images import BadImage, check_header
from lightning_mm.data.ledger import Ledger
from lightning_mm.data.sample import Rejection, Sample
from lightning_mm.decisions import decide

_MAX_HEADERS = 20_000


class Preflight:
    """Headers that have been read.

    Args:
        ledger: Takes the samples whose pictures are not sound.
        max_megapixels: Largest picture that is decoded.

    Attributes:
        sizes: Width and height in pixels of the pictures whose headers were read and are sound.
    """

    def __init__(self, ledger: Ledger, max_megapixels: float) -> None:
        self._ledger, self._max_megapixels = ledger, max_megapixels
        self._faults: dict[Path, str | None] = {}
        self.sizes: dict[Path, tuple[int, int]] = {}

    def sound(self, samples: Sequence[Sample]) -> Iterator[Sample]:
        """The samples whose pictures can be used, as far as their headers tell."""
        for sample in samples:
            fault = next((fault for path in sample.images if (fault := self._fault(path))), None)
            if fault is None:
                yield sample
            else:
                self._ledger.add([Rejection(sample.origin, fault)])

    def _fault(self, path: Path) -> str | None:
        if path not in self._faults:
            if len(self._faults) >= _MAX_HEADERS:
                decide("data.preflight", f"{_MAX_HEADERS} image headers", "the others are checked as they are decoded")
                return None
            try:
                self.sizes[path] = check_header(path, self._max_megapixels)
                self._faults[path] = None
            except BadImage as error:
                self._faults[path] = str(error)
        return self._faults[path]
