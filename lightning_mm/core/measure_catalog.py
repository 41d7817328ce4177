"""Names of all layer measures and sites in words: title, meaning, range and direction.

Sites say where in the model, or between which tokens, something was measured.

Data flow: measure and site of a row of layers.csv -> ``measure``, ``describe_site`` -> the words, groups and scales of
the report and W&B. A measure or site that is not here is drawn under its own name.
"""

from dataclasses import dataclass, replace
from typing import Literal

Question = Literal["global", "local", "meeting", "shape", "moved", "causal", "selection", "other"]

QUESTIONS: dict[Question, tuple[str, str]] = {
    "global": ("Do picture and text agree?", "Global meaning: whether a caption belongs to the picture."),
    "local": ("Which objects?", "Local meaning: what is in the picture, and where."),
    "meeting": ("Where do picture and caption meet?", "Pictures and their captions, each read alone, compared."),
    "shape": ("Shape of the representations", "How many directions a layer uses, and how it spreads over them."),
    "moved": ("What moved since the start", "Each layer now, compared with itself before the first step."),
    "causal": ("What causes the answer?", "What the answer loses where a part is cut, and gains where it is put back."),
    "selection": ("Scores of the layer selection", "What the choice of layers rests on."),
    "other": ("Other measures", "Measures that the report has no words for."),
}


@dataclass(frozen=True)
class Measure:
    """One quantity that is measured in every layer.

    Args:
        name: Name in layers.csv.
        title: Title in the report.
        meaning: Short description for a newcomer.
        question: The question that it helps to answer; groups the report.
        unit: Unit of the values.
        better: Which direction is better; None where neither is.
        low: Smallest possible value; None where there is no bound.
        high: Largest possible value; None where there is no bound.
        seek: Which extreme over the layers is of interest.
        main: Number of sites that the report shows by default; 0 shows the measure on demand only.
    """

    name: str
    title: str
    meaning: str
    question: Question = "other"
    unit: str = ""
    better: Literal["min", "max"] | None = None
    low: float | None = None
    high: float | None = None
    seek: Literal["min", "max"] = "max"
    main: int = 0

    @property
    def from_chance(self) -> bool:
        """Whether axes start at the chance level; for shapes it is far from the values and would hide differences."""
        return self.question != "shape"

    @property
    def in_percent(self) -> bool:
        return self.unit in ("accuracy", "share")

    @property
    def null_word(self) -> str:
        """Name of the null: chance, or the unchanged model."""
        return "no effect" if self.question == "causal" else "chance"


def _share(name: str, title: str, meaning: str, question: Question, main: int = 0) -> Measure:
    """An accuracy of a probe."""
    return Measure(name, title, meaning, question, "accuracy", "max", 0, 1, main=main)


def _area(name: str, title: str, meaning: str, question: Question, main: int = 0) -> Measure:
    return Measure(name, title, meaning, question, "area under ROC", "max", 0, 1, main=main)


def _likeness(name: str, title: str, meaning: str, low: float = 0, main: int = 0) -> Measure:
    """Similarity of pictures and captions, at most 1."""
    return Measure(name, title, meaning, "meeting", "similarity", "max", low, 1, main=main)


def _apart(name: str, title: str, meaning: str, unit: str, high: float | None = None, main: int = 0) -> Measure:
    """Distance of pictures and captions; the minimum is of interest."""
    return Measure(name, title, meaning, "meeting", unit, None, 0, high, "min", main)


def _shape(name: str, title: str, meaning: str, unit: str, *, main: int = 0) -> Measure:
    return Measure(name, title, meaning, "shape", unit, main=main)


def _kept(name: str, title: str, meaning: str, low: float = 0, main: int = 0) -> Measure:
    """Similarity to the starting model; the minimum, where the most has changed, is of interest."""
    return Measure(name, title, meaning, "moved", "similarity", None, low, 1, "min", main)


def _cause(name: str, title: str, meaning: str, unit: str, seek: Literal["min", "max"], main: int = 0) -> Measure:
    """Effect of an intervention on the answer."""
    signed = name in ("trace", "trace_effect", "trace_ratio") or seek == "min"
    low, high = (0, 1) if unit in ("accuracy", "probability") else (None if signed else 0, None)
    return Measure(name, title, meaning, "causal", unit, None, low, high, seek, main)


_KNOWN = (
    _share("entailment/hard", "Entailment, hard", "true caption against one that nearly fits", "global", 1),
    _share("entailment/random", "Entailment, random", "true caption against another picture's", "global", 1),
    Measure(
        "global_minus_local", "Global minus local", "entailment less objects, each above chance", "global", "difference"
    ),
    _area("objects", "Objects", "which objects the picture shows, mean over objects", "local", 2),
    _share("object_at_patches", "Object at its patches", "which object, from its own image tokens", "local"),
    _share("position", "Position", "where in the picture an object is", "local"),
    _share("count", "Count", "how many objects the picture shows", "local"),
    _likeness("overlap", "Shared neighbours", "nearest neighbours that picture and caption share", main=2),
    _likeness("cka", "CKA", "linear CKA of pictures and captions, debiased", -1, main=1),
    _likeness("cka_rbf", "CKA, RBF", "CKA of pictures and captions with a Gaussian kernel, debiased", -1),
    _likeness("cka_biased", "CKA, biased", "linear CKA as it is often printed: high by chance alone"),
    _likeness("svcca", "SVCCA", "mean correlation of the leading directions"),
    _likeness("pwcca", "PWCCA", "correlation of directions, weighted by what they carry"),
    _likeness("procrustes", "Procrustes", "likeness after the best rotation"),
    _likeness("distance_correlation", "Distance correlation", "of rows of length 1; high by chance alone"),
    Measure(
        "id_correlation",
        "Dimension correlation",
        "intrinsic dimensions that pictures and captions share (I_dCor); not 0 by chance alone",
        "meeting",
        "share of dimensions",
        "max",
    ),
    _likeness("rsa", "RSA", "rank correlation of all distances", -1),
    _likeness("matched_cosine", "Matched cosine", "cosine of matching pairs less that of others", -2),
    _likeness("token_cosine", "Cosine of tokens", "median cosine of one token of each", -1),
    _apart("imbalance_image_to_text", "Imbalance, picture to caption", "0: pictures tell captions", "rank share", 2),
    _apart("imbalance_text_to_image", "Imbalance, caption to picture", "0: captions tell pictures", "rank share", 2),
    _apart("alignment", "Alignment distance", "squared distance of matching pairs on the unit sphere", "distance", 4),
    _apart("gap", "Modality gap", "distance of the mean picture from the mean caption", "distance", 2, main=1),
    _apart("gap_auc", "Modality gap, AUC", "how well a line parts pictures from captions", "area under ROC", 1, main=1),
    _apart("frechet", "Fréchet distance", "distance of the two clouds by mean and covariance", "distance"),
    _apart("mmd", "MMD", "distance of the two clouds by a Gaussian kernel", "squared distance"),
    _shape("id_gride", "Intrinsic dimension", "directions that data vary in locally (GRIDE)", "dimensions", main=1),
    _shape(
        "id_calibrated", "Intrinsic dimension, calibrated", "of the Gaussian cloud that GRIDE reads so", "dimensions"
    ),
    _shape("id_twonn", "Intrinsic dimension, 2NN", "directions that data vary in, at the shortest range", "dimensions"),
    _shape("participation_ratio", "Participation ratio", "directions that carry the variance", "dimensions"),
    _shape("effective_rank", "Effective rank", "exponential of the entropy of the spectrum", "dimensions"),
    _shape("rankme", "RankMe", "effective rank without centring", "dimensions"),
    _shape("alpha_req", "Spectral decay", "how steeply the spectrum falls: 1 is balanced", "exponent"),
    _shape("entropy", "Spectral entropy", "how evenly the variance is spread, 0 to 1", "share of the most"),
    _shape("entropy_unit_rows", "Dataset entropy", "spectral entropy of rows of length 1, 0 to 1", "share of the most"),
    _shape("anisotropy", "Anisotropy", "mean cosine of two samples: 1 is a narrow cone", "cosine"),
    _shape("uniformity", "Uniformity", "how evenly samples cover the sphere: lower is more even", "log kernel"),
    _shape("label_overlap", "Neighbours of one kind", "nearest neighbours with the same label", "fraction"),
    _shape("block_influence", "Block influence", "how much the block turns its input: 1 - cosine", "1 - cosine"),
    _shape("angular_distance", "Angular distance", "angle between a block's input and output", "share of 180°"),
    _kept("drift_overlap", "Neighbours kept since the start", "nearest neighbours that are as before training", main=2),
    _kept("drift_cka", "CKA with the start", "linear CKA with the same layer before training", -1),
    _kept("drift_procrustes", "Procrustes with the start", "likeness to the start after the best rotation"),
    _kept("drift_cosine", "Cosine with the start", "mean cosine of a sample now and before training", -1),
    Measure("drift_id", "Change of dimension", "intrinsic dimension now less before", "moved", "dimensions"),
    Measure("drift_weights", "Weights moved", "norm of a block's change over that of its weights", "moved", "share"),
    _cause("flow", "Attention flow", "share of what attention writes there that comes from here", "share", "max", 4),
    _cause("knockout", "Attention cut", "change of the answer's probability where it cannot look", "share", "min", 5),
    _cause("knockout_accuracy", "Attention cut, accuracy", "answers still right with it cut", "accuracy", "min"),
    _cause("knockout_kl", "Attention cut, divergence", "how far all answers' probabilities move", "nats", "max"),
    _cause("ablation", "Layers taken away", "change of the answer's probability without it", "share", "min", 4),
    _cause("transplant", "Layers transplanted", "accuracy of the old model with trained layers", "accuracy", "max", 4),
    _cause("trace", "Put back", "share of the lost probability that comes back, mean over questions", "share", "max"),
    _cause("trace_effect", "Put back, mean effect", "gain of the answer's probability, as 2406.04236", "change", "max"),
    _cause("trace_ratio", "Put back, ratio of means", "mean gain over the mean loss of probability", "share", "max"),
    _cause("trace_restored", "Put back, restored", "the answer's probability with it put back", "probability", "max"),
    Measure("score", "Selection score", "mean of the chosen criteria, standardised", "selection", "z", "max"),
)
_BY_NAME = {measure.name: measure for measure in _KNOWN}

_VARIANTS = {
    "text_only": (", without the picture", "{}, with the picture withheld", None),
    "selectivity": (", selectivity", "{}: accuracy less that on random labels", "accuracy"),
    "compression": (", compression", "{}: how many times shorter the labels get (MDL)", "times"),
}


_RANK = {name: rank for rank, name in enumerate(_BY_NAME)}


def rank(known: Measure) -> int:
    """Position of a measure in the catalog, variants beside their parent; unknown ones come last."""
    return _RANK.get(known.name, _RANK.get(known.name.rpartition("/")[0], len(_RANK)))


def measure(name: str) -> Measure:
    """The catalog entry of a measure; for an unknown one, its name.

    Example:
        >>> measure("entailment/hard/text_only").title
        'Entailment, hard, without the picture'
        >>> measure("my_own").question
        'other'
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    parent, _, variant = name.rpartition("/")
    if parent in _BY_NAME and variant in _VARIANTS:
        return _variant(_BY_NAME[parent], variant)
    return Measure(name, name[:60], "")


def _variant(parent: Measure, variant: str) -> Measure:
    title, meaning, unit = _VARIANTS[variant]
    bounds = {"text_only": (parent.low, parent.high), "selectivity": (-1, 1)}.get(variant, (0, None))
    return replace(
        parent,
        name=f"{parent.name}/{variant}",
        title=parent.title + title,
        meaning=meaning.format(parent.meaning),
        unit=unit or parent.unit,
        better=None if variant == "text_only" else "max",
        low=bounds[0],
        high=bounds[1],
        main=0,
    )


SITE_WORDS = {
    "": "",
    "last": "last token",
    "picture": "last token, picture",
    "text": "last token, caption",
    "image": "picture tokens",
    "object": "object tokens",
    "token": "one random token",
    "token_last": "one random token, both in one prompt",
    "image~text": "picture and caption tokens",
    "skip": "whole layer skipped",
}
MODULE_SITES = {"mlp": "MLP", "attention": "Attention", "residual": "Residual stream"}
"""Modules whose output is restored (trace) or ablated."""
TOKEN_CLASSES = {
    "image_early": "picture, early",
    "image_late": "picture, late",
    "constraint": "constraint",
    "question": "rest of question",
    "template": "template",
    "last": "last token",
}
"""Token classes of a question with a picture, in the order of the prompt; ``causal.questions`` assigns them."""

_ENDS = {"image": "picture", "image_early": "early picture tokens", "image_late": "late picture tokens"}
_ENDS |= {"constraint": "constraint", "question": "question", "last": "last token"}
_CUTS = {"": "", "pre": ", rest renormalised (pre)", "post": ", rest unchanged (post)"}
_PARTS = {"mlp": "MLP", "attention": "attention", "residual": "residual stream"}
_ASKED = {"image": "questions with a picture", "text": "questions in text"}
_HEADS: dict[str, tuple[str, dict[str, str]]] = {
    "cumulative": ("all layers up to this one", _ASKED),
    "sliding": ("layers about this one", _ASKED),
    "zero": ("output set to zero", _PARTS),
    "mean": ("output set to its mean", _PARTS | {"image": "picture tokens"}),
    **{site: (f"{words} put back", TOKEN_CLASSES) for site, words in MODULE_SITES.items()},
}


def describe_site(site: str) -> str:
    """A site in words; an unknown one under its own name.

    Example:
        >>> describe_site("image->constraint/pre"), describe_site("zero/mlp"), describe_site("my/own")
        ('picture to constraint, rest renormalised (pre)', 'output set to zero, MLP', 'my/own')
    """
    if site in SITE_WORDS:
        return SITE_WORDS[site]
    edge, _, kind = site.partition("/")
    start, arrow, end = edge.partition("->")
    if arrow and kind in _CUTS:
        return f"{_ENDS.get(start, start[:40])} to {_ENDS.get(end, end[:40])}{_CUTS[kind]}"
    if edge in _HEADS and kind:
        words, known = _HEADS[edge]
        return f"{words}, {known.get(kind, kind[:40])}"
    return site[:40]
