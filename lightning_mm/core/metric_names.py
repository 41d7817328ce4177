"""Names of all metrics with unit, meaning and direction: the one vocabulary of what is logged.

Every rank logs the same keys (Lightning would silently reduce different ones into each other), so ``declare`` lists
them all.

Data flow: ``training`` and ``callbacks`` log under these keys; ``report`` and the progress bar look them up.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lightning_mm.core.measure_catalog import measure

Stage = Literal["val", "test"]
Moment = Literal["before", "after", "no_image", "majority"]
"""When a run's held-out questions were answered, and by what; ``no_image``: after training, with blank pictures."""
LayerFact = Literal[
    "peak_layer", "peak", "peak_clear", "peak_low", "peak_high", "plateau_low", "plateau_high", "in_trained_range"
]
"""What is logged of a measure's profile over the layers."""

TRAIN_LOSS = "train/loss"
GRAD_NORM = "train/grad_norm"
SUPERVISED_TOKENS_PER_SECOND = "train/supervised_tokens_per_second"
TOKENS_PER_SECOND = "train/tokens_per_second"
IMAGE_TOKENS_PER_SECOND = "train/image_tokens_per_second"
SAMPLES_PER_SECOND = "train/samples_per_second"
TFLOPS = "train/tflops_per_second"
MFU = "train/mfu"
DATA_WAIT = "train/data_wait"
PADDING = "train/padding"
PEAK_MEMORY = "train/peak_memory"
LEARNING_RATE = "train/lr"
TOKEN_SHARE = "train/token_share"
REJECTED = "data/rejected"
VAL_LOSS = "val/loss"
VAL_TOKEN_ACCURACY = "val/token_accuracy"
VAL_EXACT_MATCH = "val/exact_match"
INSPECTION_SECONDS = "inspect/seconds"
INSPECTION_SHARE = "inspect/share"


@dataclass(frozen=True)
class Metric:
    """One measured quantity.

    Args:
        name: Key it is logged under; slashes separate namespaces.
        unit: Unit of the values.
        meaning: Short description for a newcomer.
        better: Which direction is better; None where neither is.
        summary: Which value stands for the run in W&B's summary.
        hidden: Whether W&B makes no chart of it by default.
    """

    name: str
    unit: str
    meaning: str
    better: Literal["min", "max"] | None = None
    summary: Literal["min", "max", "mean", "last"] = "last"
    hidden: bool = False


def _scores(stage: Stage) -> tuple[Metric, ...]:
    nats, share = "nats per supervised token", "fraction"
    return (
        Metric(f"{stage}/loss", nats, "cross-entropy on answer tokens not trained on", "min", "min"),
        Metric(f"{stage}/token_accuracy", share, "answer tokens whose most likely prediction is right", "max", "max"),
        Metric(f"{stage}/exact_match", share, "generated answers equal to the truth", "max", "max"),
        Metric(f"{stage}/cider", "CIDEr-D, 0 to 10", "likeness of generated answers to all references", "max", "max"),
    )


_FIXED = (
    Metric(TRAIN_LOSS, "nats per supervised token", "cross-entropy on answer tokens", "min", "min"),
    Metric(GRAD_NORM, "l2 norm", "size of the gradient of all trained weights, before clipping", summary="max"),
    Metric(
        SUPERVISED_TOKENS_PER_SECOND, "tokens/s", "answer tokens trained on per second, over all ranks", "max", "mean"
    ),
    Metric(TOKENS_PER_SECOND, "tokens/s", "tokens per second, padding left out, over all ranks", "max", "mean"),
    Metric(IMAGE_TOKENS_PER_SECOND, "tokens/s", "those of them that stand for pictures", "max", "mean"),
    Metric(SAMPLES_PER_SECOND, "samples/s", "conversations trained on per second, over all ranks", "max", "mean"),
    Metric(TFLOPS, "TFLOP/s", "arithmetic that this policy needs at least, per second, over all ranks", "max", "mean"),
    Metric(MFU, "fraction", "that arithmetic, as a share of what this device's matrix products reach", "max", "mean"),
    Metric(DATA_WAIT, "fraction", "share of the training time spent waiting for the next batch", "min", "mean"),
    Metric(PADDING, "fraction", "share of the positions of the batches that are padding", "min", "mean"),
    Metric(PEAK_MEMORY, "GiB", "most memory held at once so far, by the rank that held most", "min", "max"),
    Metric(REJECTED, "rows", "rows dropped or cut so far, each with its reason in the ledger", "min"),
    *_scores("val"),
    *_scores("test"),
    Metric("test/no_image", "fraction", "exact match with the picture withheld"),
    Metric("test/majority", "fraction", "exact match of always giving the training data's most frequent answer"),
    Metric("evaluation/before", "fraction", "exact match on held-out questions before the first step", "max"),
    Metric("evaluation/after", "fraction", "exact match on held-out questions after the last step", "max"),
    Metric("evaluation/no_image", "fraction", "exact match after the last step with blank pictures"),
    Metric("evaluation/majority", "fraction", "exact match of always giving the training data's most frequent answer"),
    Metric(INSPECTION_SECONDS, "s", "time that the last look inside the model took", "min"),
    Metric(INSPECTION_SHARE, "fraction", "all looks inside so far, as a share of the training time", "min"),
)
_HELD_OUT = tuple(f"evaluation/{moment}" for moment in get_args(Moment))
_PER_TYPE = ("val/exact_match", "test/exact_match", "test/no_image", "test/majority", *_HELD_OUT)
_PER_SOURCE = (TRAIN_LOSS, VAL_LOSS, "test/loss", TOKEN_SHARE)
FIXED = tuple(metric.name for metric in _FIXED)
"""Names of the metrics that depend on no question type, source, layer or group."""
_BY_NAME = {metric.name: metric for metric in _FIXED}


def exact_match(stage: Stage, question_type: str | None = None) -> str:
    """The key of exact match, over all questions or those of one type."""
    return _join(f"{stage}/exact_match", question_type)


def no_image(question_type: str | None = None) -> str:
    """The key of exact match on the test split without the picture."""
    return _join("test/no_image", question_type)


def majority(question_type: str | None = None) -> str:
    """The key of the majority baseline on the test split."""
    return _join("test/majority", question_type)


def held_out(moment: Moment, question_type: str | None = None) -> str:
    """The key of exact match on a run's held-out questions at one moment, over all of them or those of one type."""
    return _join(f"evaluation/{moment}", question_type)


def source_loss(stage: Literal["train", "val", "test"], source: str) -> str:
    """The key of the loss on one source of several."""
    return _join(f"{stage}/loss", source)


def token_share(source: str) -> str:
    """The key of the share that one source of several has in the supervised tokens of training."""
    return _join(TOKEN_SHARE, source)


def learning_rate(group: str) -> str:
    """The key of the learning rate of one parameter group."""
    return _join(LEARNING_RATE, group)


def layer_metric(name: str, site: str, what: LayerFact) -> str:
    """The key of one fact of a measure's profile over the layers.

    Args:
        name: The measure, as ``measure_catalog.measure`` knows it.
        site: Where it was measured; without a slash.
        what: Which fact.

    Example:
        >>> layer_metric("entailment/hard", "last", "peak_layer")
        'inside/entailment/hard/last/peak_layer'
    """
    assert site, "a profile is read somewhere"
    assert "/" not in site, f"{site!r} would be read as a part of the measure"
    return f"inside/{name}/{site}/{what}"


def declare(
    question_types: Iterable[str],
    groups: Iterable[str] = (),
    profiles: Iterable[tuple[str, str]] = (),
    sources: Iterable[str] = (),
) -> dict[str, Metric]:
    """All metrics that a run may log, by key, in a fixed order: the same on every rank.

    Args:
        question_types: Question types of the data, in any order.
        groups: Names of the optimizer's parameter groups; none by default.
        profiles: (measure, site) pairs whose profiles are logged; none by default.
        sources: Names of the sources of the data, where there are several; none by default.

    Example:
        >>> [key for key in declare(["colour", "shape"]) if key.startswith("val/exact_match")]
        ['val/exact_match', 'val/exact_match/colour', 'val/exact_match/shape']
    """
    types = sorted(set(question_types))
    typed = [_of_type(parent, kind) for parent in _PER_TYPE for kind in types]
    inside = [_of_layers(*pair, what) for pair in sorted(set(profiles)) for what in get_args(LayerFact)]
    mixed = [_of_source(parent, source) for parent in _PER_SOURCE for source in sorted(set(sources))]
    return _BY_NAME | {
        metric.name: metric for metric in (*typed, *map(_of_group, sorted(set(groups))), *inside, *mixed)
    }


def lookup(name: str) -> Metric | None:
    """The metric of a key, with any question type, source or parameter group; None where the vocabulary has none."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    for parent in _PER_TYPE:
        if name.startswith(parent + "/"):
            return _of_type(parent, name.removeprefix(parent + "/"))
    for parent in _PER_SOURCE:
        if name.startswith(parent + "/"):
            return _of_source(parent, name.removeprefix(parent + "/"))
    start, *middle = name.split("/")
    if start == "inside" and len(middle) > 2 and middle[-1] in get_args(LayerFact):
        return _of_layers("/".join(middle[:-2]), middle[-2], middle[-1])
    return _of_group(name.removeprefix(LEARNING_RATE + "/")) if name.startswith(LEARNING_RATE + "/") else None


def _of_type(parent: str, kind: str) -> Metric:
    metric = _BY_NAME[parent]
    return replace(metric, name=_join(parent, kind), meaning=f"{metric.meaning}, for questions of type {kind!r}")


def _of_source(parent: str, source: str) -> Metric:
    name = _join(parent, source)
    if parent == TOKEN_SHARE:
        return Metric(name, "fraction", f"share of the answer tokens trained on that are of the source {source!r}")
    return replace(_BY_NAME[parent], name=name, meaning=f"{_BY_NAME[parent].meaning}, of the source {source!r}")


def _of_group(group: str) -> Metric:
    return Metric(learning_rate(group), "per step", f"learning rate of the parameter group {group!r}")


def _of_layers(name: str, site: str, what: str) -> Metric:
    """One fact of a profile; W&B charts the peaks of the main measures only: a few charts, not hundreds."""
    known = measure(name)
    where = f"{known.title} at {site}"
    unit, meaning = {
        "peak_layer": ("layer", f"the layer where {where} has its extreme"),
        "peak": (known.unit, f"{where}, in that layer"),
        "peak_clear": (
            "0 or 1",
            f"1 where that extreme for {where} is clear of chance, over all layers where that is known",
        ),
        "peak_low": ("layer", f"first layer of the 95 % interval of where {where} has its extreme"),
        "peak_high": ("layer", f"last layer of the 95 % interval of where {where} has its extreme"),
        "plateau_low": ("layer", f"first layer about that extreme whose interval for {where} reaches it"),
        "plateau_high": ("layer", f"last layer about that extreme whose interval for {where} reaches it"),
        "in_trained_range": ("fraction", f"share of the layers where {where} keeps half its height that trains"),
    }[what]
    shown = known.main > 0 and what in ("peak_layer", "peak")
    better = known.better if what == "peak" else None
    return Metric(layer_metric(name, site, what), unit, meaning, better, hidden=not shown)  # type: ignore[arg-type]


def _join(name: str, part: str | None) -> str:
    return name if part is None else f"{name}/{part}"
