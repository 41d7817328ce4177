"""Items of Tao et al. 2024, arXiv:2402.17304: entailment and object recognition probed at each layer.

Data flow: folder of ``inspect`` -> items.
"""

from pathlib import Path

from paper_pages import charts
from paper_pages.items import Item, Profile, Readings, drop_words, peak_words, told

TITLE = "Tao et al. 2024 (arXiv:2402.17304): global and local semantics, layer by layer"
LEAD = (
    "Frozen model; a linear probe on the last prompt token of each layer. Global: does the caption belong to the "
    "picture? Local: which objects are there?",
    "Of this paper only the abstract and reviews could be read; its code could not. The prompt is quoted from memory, "
    "and the numbers of its figures and tables are not known: items are named after what they show.",
)
_UNKNOWN = (
    "not verifiable: wording of the prompt, token read for the local task, size of train and test, optimizer",
    "pictures of the probe file, not COCO's; 5-fold cross-fitting over whole pictures, C chosen by validation",
)


def items(folder: Path) -> list[Item]:
    """All items of the page.

    Args:
        folder: runs/papers/p1, with what ``inspect`` wrote in ``inspect``.
    """
    read = Readings(folder / "inspect")
    return [_entailment(read), _objects(read), _contrast(read), _table(read)]


def _entailment(read: Readings) -> Item:
    random = read.profile("entailment/random", "last", "entailment, caption of another picture")
    hard = read.profile("entailment/hard", "last", "entailment, one noun swapped")
    blind = read.profile("entailment/random/text_only", "last", "the same without the picture")
    words = [peak_words(random), drop_words(random), peak_words(hard)]
    if blind:
        words.append(f"Without the picture the best layer gives {told(blind.peak)}: what captions alone give away.")
    return Item(
        "Figure: entailment accuracy by layer (global)",
        "intermediate layers do better than the topmost ones on visual-language entailment (abstract)",
        words,
        [charts.lines([random, hard, blind], "accuracy")],
        files=[read.file],
        deviations=_UNKNOWN,
    )


def _objects(read: Readings) -> Item:
    last = read.profile("objects", "last", "objects, last prompt token")
    image = read.profile("objects", "image", "objects, mean of picture tokens")
    patches = read.profile("object_at_patches", "object", "object at its patches (accuracy)")
    return Item(
        "Figure: object recognition by layer (local)",
        "topmost layers may focus excessively on local information (abstract)",
        [peak_words(last), drop_words(last), peak_words(image), peak_words(patches)],
        [charts.lines([last, image], "area under ROC"), charts.lines([patches], "accuracy")],
        files=[read.file],
        deviations=(*_UNKNOWN, "AUROC over kinds of things with 8 pictures or more, not accuracy over COCO's 80"),
    )


def _contrast(read: Readings) -> Item:
    contrast = read.profile("global_minus_local", "last", "global less local")
    return Item(
        "Figure: global less local",
        "the trade of both along the layers (abstract; the paper draws them apart)",
        [peak_words(contrast), drop_words(contrast)],
        [charts.lines([contrast], "above chance, difference")] if contrast else [],
        files=[read.file],
    )


def _table(read: Readings) -> Item:
    tasks = [
        ("entailment/random", "last"),
        ("entailment/hard", "last"),
        ("objects", "last"),
        ("objects", "image"),
        ("object_at_patches", "object"),
    ]
    found = [(f"{measure}, {site}", read.profile(measure, site, measure)) for measure, site in tasks]
    rows = [_row(name, profile) for name, profile in found if profile]
    head = ("task and token", "first block", "best layer", "value there", "top layer", "n")
    return Item("Table: first, best and top layer", "not known", ["In numbers."], tables=[(head, rows)])


def _row(name: str, profile: Profile) -> list[str]:
    peak, first = profile.peak, profile.rows.get(0)
    return [
        name,
        "" if first is None else f"{first.value:.3g}",
        f"{peak.layer} ({profile.depth(peak):.0%} of the depth)",
        told(peak),
        told(profile.top),
        str(peak.n),
    ]
