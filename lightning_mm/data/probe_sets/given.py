"""A probe set from whatever a caller has: a set, a file of one, a file of annotated pictures, or rows in memory.

Data flow: file, rows, ``ProbeSet`` or ``Probes`` -> ``open_probes`` -> ``ProbeSet``.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_mm.core.errors import UserError
from lightning_mm.data.probe_sets.build import ENTAILMENT_PROMPT, open_probe_set
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.data.readers.rows import PathLike, Rows, as_file
from lightning_mm.data.rejected_samples import RejectedSamples

MAX_PICTURES = 64
"""Pictures of a probe set that callbacks draw, as ``MMDataModule(probe_images=...)``."""


@dataclass(frozen=True)
class Probes:
    """The pictures that a look inside reads, how many and how: ``ProbingCallback(probes=Probes("probes.json", ...))``.

    Args:
        rows: A ``ProbeSet``, or a file or rows of pictures with captions and objects.
        max_pictures: Largest number of pictures; default 64.
        batch_size: Rows per forward pass; default 4.
        max_length: Longest row in tokens, longer ones are rejected; None (default): the data module's, else no limit.
        image_root: Folder that pictures are relative to; None: the file's own, for rows the current folder.
    """

    rows: Any
    max_pictures: int = MAX_PICTURES
    batch_size: int = 4
    max_length: int | None = None
    image_root: PathLike | None = None

    def __post_init__(self) -> None:
        longest = 1 if self.max_length is None else self.max_length
        if self.batch_size < 1 or self.max_pictures < 2 or longest < 1:
            given = f"max_pictures={self.max_pictures}, batch_size={self.batch_size}, max_length={self.max_length}"
            raise UserError(
                f"Probes({given}) reads nothing.",
                "A look needs 2 pictures or more, a row or more at a time, and a token or more in a row.",
                "Give larger numbers.",
            )


def open_probes(
    probes: PathLike | Rows | ProbeSet,
    rejected: RejectedSamples,
    *,
    image_root: PathLike | None = None,
    max_pictures: int = MAX_PICTURES,
    prompt: str = ENTAILMENT_PROMPT,
) -> ProbeSet:
    """The probe set of a caller.

    Args:
        probes: A ``ProbeSet``, taken as it is; or a file that one was saved to; or a file, or rows in memory, of
            pictures with captions and objects, LLaVA's conversations, or (file only) COCO's annotations.
        rejected: Takes rows that cannot be used.
        image_root: Folder that pictures are relative to; None: the file's own, for rows the current folder.
        max_pictures: Largest number of pictures; default 64.
        prompt: Prompt of the entailment rows, with ``{caption}`` in it.

    Raises:
        UserError: The rows cannot be read, or nothing in them can be probed.
    """
    if isinstance(probes, ProbeSet):
        return probes
    with ExitStack() as stack:
        file, root = as_file(probes, image_root, "probes", stack)
        drawn = open_probe_set(file, root, rejected, max_pictures=max_pictures, prompt=prompt)
    return drawn if isinstance(probes, (str, Path)) else replace(drawn, source="rows in memory")
