"""The base class of callbacks of transformers' Trainer, apart from the rest: importing it costs a second.

Data flow: transformers -> ``callbacks.hf``, which is imported where it is used and not before.
"""

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["TrainerCallback", "TrainerControl", "TrainerState", "TrainingArguments"]
