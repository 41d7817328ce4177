"""The module as command line and config files see it: every argument has one type that can be written down.

Data flow: ``model:`` of a config file -> ``ModuleOptions`` -> an ``MMModule``.
"""

from typing import Any

from lightning_mm.models.loading import Backbone
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import TuningPolicy
from lightning_mm.tuning.optimizer import OptimizerSettings


class ModuleOptions(MMModule):
    """Partial fine-tuning of a multimodal LLM.

    Args:
        backbone: The Hugging Face model.
        tuning: Which weights move; IntermediateOnly if not given.
        optimizer: AdamW and its schedule.
    """

    def __init__(
        self,
        backbone: Backbone,
        tuning: TuningPolicy | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008  (frozen)
        **options: Any,
    ) -> None:
        super().__init__(backbone, tuning, optimizer, lr=None, processor=None, **options)
