"""Who is compared with whom: one line each.

An arm of ours is a list of options of ``lightning-mm fit``; an arm of theirs is a set of training arguments. Conditions
of the comparison (model, rows and their order, rows per batch, float32, AdamW at a constant 1e-4 without decay or
clipping, nothing saved or sent) are added for all by ``running.py``.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

MIDDLE = "8-15"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        key: Its name in the results.
        label: Its name in the table.
        who: Whose trainer it is.
        train: 'full' (all but the vision tower), or the first and last block that trains.
        options: Of the product's command line; {work} stands for a folder that all runs share.
        args: Training arguments, where they differ from that trainer's defaults.
        flags: Of ``theirs.py``.
        warm: Whether what it keeps on disk is filled by a run before the first round.
        optional: Whether the others go on without it where it fails (a compiler is not everywhere).
    """

    key: str
    label: str
    who: Literal["ours", "trl", "transformers"]
    train: str
    options: tuple[str, ...] = ()
    args: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    warm: bool = False
    optional: bool = False


def tuning(train: str) -> tuple[str, ...]:
    """The product's options for what trains."""
    if train == "full":
        return ("--model.tuning", "Full")
    return ("--model.tuning", "IntermediateOnly", "--model.tuning.layers", train)


_COLD = ("--model.cache.mode=off",)
_KEPT = ("--model.cache.mode=on", "--model.cache.folder={work}/cache")
_WORKER: dict[str, Any] = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
_COMPILED: dict[str, Any] = {"torch_compile": True}
# TRL 1.16: the loss is chunked whatever loss_type says; packing and padding_free are refused for pictures.
_TRL_BEST: dict[str, Any] = {"gradient_checkpointing": False}
_ANSWERS = ("--answers_only_head",)

_OURS, _TRL, _TRAINER = "lightning_mm", "TRL SFTTrainer", "transformers Trainer"
_ALL, _FEW = "all but the vision tower", "layers 8-15"
_BEST, _PATCHED = "its best settings", "patched to score answers only, as on a GPU"

ARMS = (
    Arm("ours.full", f"{_OURS}, {_ALL}", "ours", "full", _COLD),
    Arm("ours.middle", f"{_OURS}, {_FEW}", "ours", MIDDLE, _COLD),
    Arm("ours.middle.kept", f"{_OURS}, {_FEW}, frozen prefix from its cache", "ours", MIDDLE, _KEPT, warm=True),
    Arm("trl.middle.default", f"{_TRL}, {_FEW}, its defaults", "trl", MIDDLE),
    Arm("trl.middle.best", f"{_TRL}, {_FEW}, {_BEST}", "trl", MIDDLE, args=_TRL_BEST),
    Arm("trl.middle.worker", f"{_TRL}, {_FEW}, {_BEST}", "trl", MIDDLE, args=_TRL_BEST | _WORKER),
    Arm("trl.middle.compiled", f"{_TRL}, {_FEW}, {_BEST}", "trl", MIDDLE, args=_TRL_BEST | _COMPILED, optional=True),
    Arm("trl.middle.patched", f"{_TRL}, {_FEW}, {_PATCHED}", "trl", MIDDLE, args=_TRL_BEST, flags=_ANSWERS),
    Arm("trainer.middle", f"{_TRAINER}, {_FEW}", "transformers", MIDDLE),
    Arm("trainer.middle.worker", f"{_TRAINER}, {_FEW}", "transformers", MIDDLE, args=_WORKER),
    Arm("trl.full.best", f"{_TRL}, {_ALL}, no checkpointing", "trl", "full", args=_TRL_BEST),
    Arm("trainer.full", f"{_TRAINER}, {_ALL}", "transformers", "full"),
)
"""Arms with the same label are ways to the same end: the table shows the fastest."""

BASIS = "ours.middle"
"""What the others' times are given in units of."""

Axis = Literal["layers", "image_tokens", "batch", "ranks"]


@dataclass(frozen=True)
class Growth:
    """The product's middle arm with one thing changed."""

    axis: Axis
    value: int
    train: str = MIDDLE
    image_size: int = 112
    batch_size: int = 8
    ranks: int = 1

    @property
    def conditions(self) -> tuple[str, int, int, int]:
        """What is run; points of several axes may share it."""
        return self.train, self.image_size, self.batch_size, self.ranks

    @property
    def arm(self) -> Arm:
        """The product, at this point."""
        return Arm(f"growth.{self.axis}.{self.value}", "", "ours", self.train, _COLD)


def growth(image_tokens: dict[int, int]) -> tuple[Growth, ...]:
    """Time against layers, image tokens, batch and ranks.

    Args:
        image_tokens: Sides of pictures in pixels, by the number of their tokens.
    """
    return (
        Growth("layers", 8),
        Growth("layers", 16, train="8-23"),
        Growth("layers", 30, train="0-29"),
        *(Growth("image_tokens", tokens, image_size=size) for tokens, size in image_tokens.items()),
        *(Growth("batch", size, batch_size=size) for size in (2, 4, 8)),
        Growth("ranks", 1),
        Growth("ranks", 2, batch_size=4, ranks=2),
    )
