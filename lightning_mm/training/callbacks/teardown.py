"""What a run puts into a model is taken out again, also where the run ends with an exception.

Data flow: exception in the trainer -> ``teardown`` of the module, which Lightning calls only where there is none.
"""

import lightning as L
from lightning.pytorch.callbacks import Callback


class TeardownAfterException(Callback):
    """Restores the model's own forward passes if a run ends with an exception."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        pl_module.teardown(str(trainer.state.fn))
