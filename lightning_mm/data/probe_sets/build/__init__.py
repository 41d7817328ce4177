"""Builds probe sets from any file with annotated images.

Data flow: file -> ``coco`` (all formats; with ``scenes``) -> ``sampling.select_images`` (with ``patch_grids`` for
boxes) -> ``entailment`` (with ``false_captions``) and ``objects`` -> ``sampling.build_probe_rows`` -> ``ProbeSet``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.images import load
from lightning_mm.data.probe_sets.build.coco import SceneFile, read_scenes, scenes_of_samples
from lightning_mm.data.probe_sets.build.sampling import ENTAILMENT_PROMPT, build_probe_rows, select_images
from lightning_mm.data.probe_sets.files import is_probe_set
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.sample import Sample

__all__ = ["ENTAILMENT_PROMPT", "open_probe_set", "split_for_probes"]


def open_probe_set(
    source: Path | str | Sequence[Sample],
    image_root: Path | str | None,
    rejected: RejectedSamples,
    *,
    max_pictures: int,
    prompt: str = ENTAILMENT_PROMPT,
    seed: int = 0,
    max_megapixels: float = 40.0,
    both_last: bool = False,
) -> ProbeSet:
    """A saved probe set, or one drawn from a file.

    Args:
        source: A file of ``ProbeSet.save``, or one in a format of ``coco``; or conversations that have been read.
        image_root: Folder that image paths are relative to; None takes the file's own folder. A saved set has its own.
        rejected: Takes rows that cannot be used.
        max_pictures: Largest number of images.
        prompt: Prompt of entailment rows, with ``{caption}`` in it. A saved set has its own.
        seed: Random seed of the draw.
        max_megapixels: Limit on the size of an image, in megapixels.
        both_last: Whether each image and its caption stand in one prompt too, once with either of them last. A saved
            set is as it was drawn.

    Raises:
        UserError: The file cannot be read, or nothing in it can be probed.
    """
    if isinstance(source, (str, Path)):
        path, name = Path(source), str(source)
        if path.is_file():
            with path.open("rb") as file:
                if is_probe_set(file.read(4096).decode("utf-8", errors="replace")):
                    return ProbeSet.load(path).subset(max_pictures)
        read = read_scenes(path, image_root)
    else:
        name = source[0].source if source else "no rows"
        read = scenes_of_samples(source, name)
    _check_any(name, read)
    selected, bad_pictures = select_images(read.scenes, max_pictures, lambda image: load(image, max_megapixels), seed)
    sampled = build_probe_rows(selected, source=name, prompt=prompt, seed=seed, both_last=both_last)
    rejected.num_rows["data.probes"] += read.num_rows
    rejected.add([*read.rejections, *bad_pictures, *sampled.rejections], split="data.probes")
    rejected.check()
    return sampled.probe_set


def _check_any(path: str, read: SceneFile) -> None:
    if read.rejections and not read.scenes:
        first = "\n    ".join(f"{each.origin}: {each.reason}" for each in read.rejections[:5])
        raise UserError(
            f"None of the {read.num_rows} rows of {path} can be probed.",
            f"The first of them:\n    {first}",
            'Rows look like {"image": "a.jpg", "caption": "a cat", "objects": [{"name": "cat", "box": [0, 0, 9, 9]}]}.',
        )


def split_for_probes(paths: Mapping[str, object]) -> str:
    """The split that probes are drawn from where none is given: val, or else test, never train.

    Args:
        paths: Split -> what is given for it, or None.

    Raises:
        UserError: There is neither.
    """
    for split in ("val", "test"):
        if (path := paths[split]) is not None:
            log_decision("data.probes", path, f"it is not set; what {split} tells of its pictures is used")
            return split
    raise UserError(
        "There is nothing to look inside the model with.",
        "data.probes is not set, and neither are data.val and data.test.",
        "Give --data.probes FILE, with captions or objects of pictures that are not trained on.",
    )
