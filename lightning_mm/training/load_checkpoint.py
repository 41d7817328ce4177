"""A trained module from one of its checkpoints: what ``MMModule.load_from_checkpoint`` does.

Data flow: checkpoint (trained weights, the module's arguments) + base model -> module with the trained weights.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_mm.core.errors import UserError
from lightning_mm.models.loading import Backbone
from lightning_mm.training import checkpoint as state
from lightning_mm.training.checkpoint_file import KEY, read_checkpoint
from lightning_mm.training.run_config import read_policy

if TYPE_CHECKING:
    from lightning_mm.training.module import MMModule

Module = TypeVar("Module", bound="MMModule")


def load_module(kind: type[Module], path: str | Path, backbone: Any, tuning: Any, options: dict[str, Any]) -> Module:
    """The module of a checkpoint, in eval mode on the CPU.

    Args:
        kind: The class to make.
        path: The checkpoint.
        backbone: The base model, as ``MMModule`` takes it; None: the one that the checkpoint names.
        tuning: The policy; None: the checkpoint's.
        options: Further arguments of the class.

    Raises:
        UserError: There is no such checkpoint, it does not say what is missing here, or the base is another one.
    """
    saved = read_checkpoint(Path(path))
    written = saved[KEY].get("model")
    if written is None and (backbone is None or tuning is None):
        raise UserError(
            f"{path} does not name its model and policy.",
            "An earlier version wrote it.",
            f"Give {kind.__name__}.load_from_checkpoint(path, backbone=..., tuning=...).",
        )
    if backbone is None:
        if not written["backbone"]["path"]:
            raise UserError(
                f"{path} does not name its base model.",
                "The run was given a loaded model, which came from no folder or hub name.",
                "Give load_from_checkpoint(path, backbone=model): the model as it was before training.",
            )
        backbone = Backbone(**written["backbone"])
    module = kind(backbone, read_policy(written) if tuning is None else tuning, **options)
    module.resume_from(saved)
    module.configure_model()
    state.validate_checkpoint(saved, module.census, module.base, module.trainable)
    module.load_state_dict(saved["state_dict"], strict=False)
    module.loaded_step = int(saved["global_step"])
    module.teardown("load")  # the model's own forward passes; a run prepares them again
    return module.eval()
