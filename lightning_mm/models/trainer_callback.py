"""What a callback of transformers' Trainer is made of, apart from the rest: importing it costs a second.

Data flow: transformers -> ``callbacks.hf``, which is imported where it is used and not before.
"""

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

__all__ = ["Trainer", "TrainerCallback", "TrainerControl", "TrainerState", "TrainingArguments", "trackers_of"]


def trackers_of(trainer: Trainer) -> list[TrainerCallback]:
    """The callbacks of a Trainer that write to the trackers of its ``report_to``."""
    kinds: tuple[type[TrainerCallback], ...] = tuple(INTEGRATION_TO_CALLBACK.values())
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kinds)]
