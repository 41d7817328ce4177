"""A probe set from whatever a caller has: a set, a file of one, a file of annotated pictures, or rows in memory.

Data flow: file, rows or ``ProbeSet`` -> ``open_probes`` -> ``ProbeSet``.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lightning_mm.data.probe_sets.build import ENTAILMENT_PROMPT, open_probe_set
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.data.readers.rows import PathLike, Rows, as_file
from lightning_mm.data.rejected_samples import RejectedSamples

MAX_PICTURES = 64
"""Pictures of a probe set that callbacks draw, as ``MMDataModule(probe_images=...)``."""


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
