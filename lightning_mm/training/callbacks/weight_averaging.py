"""Lightning's WeightAveraging and EMAWeightAveraging over the weights that train.

Lightning averages a copy of the whole module, made before the model is loaded; frozen weights would be held twice and
drift by rounding, and its checkpoints could not be loaded without them.

Data flow: the user's callback -> ``over_trained_weights`` -> a callback of a subclass of its class (``should_update``
and the averaging function are the user's), which takes its place in the trainer.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class _Weights(nn.Module):
    """Some parameters, under numbers."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.parts = nn.ParameterList(parameters)


class _OverTrainedWeights(WeightAveraging):
    """Replaces the whole module by the weights that train, wherever ``WeightAveraging`` handles it.

    As in Lightning, validation and the end of the run see the average, and the ``state_dict`` of a checkpoint is the
    average; the weights in training are beside it, so that a run can be resumed.
    """

    _average: AveragedModel | None = None
    _loaded: dict[str, Any] | None = None
    _exchanged = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wait for ``on_fit_start``: the model is not loaded yet."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = self._device or pl_module.device
        self._average = AveragedModel(self._weights(pl_module), device, use_buffers=False, **self._kwargs)
        if self._loaded is not None:
            for mean, value in zip(self._average.module.parameters(), self._loaded["average"], strict=True):
                mean.data.copy_(value)
            self._average.n_averaged.fill_(self._loaded["count"])
            self._loaded = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            self._update(pl_module)
            self._latest_update_step = step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            self._update(pl_module)
            self._latest_update_epoch = epoch

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._average is not None
        for weight, mean in zip(self._trained(pl_module).values(), self._average.module.parameters(), strict=True):
            weight.data.copy_(mean.data)
        self._average = None  # what is saved from now on is the average

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._exchange(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._exchange(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._exchanged:  # inside a validation
            self._exchange(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._latest_update_step, "latest_update_epoch": self._latest_update_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest_update_step = state_dict["latest_update_step"]
        self._latest_update_epoch = state_dict["latest_update_epoch"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as ``state_dict``, and the weights in training beside it."""
        if self._average is None:
            return
        names = list(self._trained(pl_module))
        current = {name: checkpoint["state_dict"][name] for name in names}
        means = [mean.data for mean in self._average.module.parameters()]
        average = dict(zip(names, means, strict=True))
        if self._exchanged:
            current, average = average, current
        checkpoint["current_model_state"] = current
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **average}
        checkpoint["averaging_state"] = {"n_averaged": int(self._average.n_averaged)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the weights that were in training, and with their average."""
        if "averaging_state" not in checkpoint or trainer.state.fn != TrainerFn.FITTING:
            return
        trained, current = self._trained(pl_module), checkpoint["current_model_state"]
        average = [checkpoint["state_dict"][name].clone() for name in trained]
        self._loaded = {"average": average, "count": checkpoint["averaging_state"]["n_averaged"]}
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(current[name])

    def _update(self, module: L.LightningModule) -> None:
        assert self._average is not None
        self._average.update_parameters(self._weights(module))

    def _exchange(self, module: L.LightningModule) -> None:
        """Let the weights in training and their average change places."""
        if self._average is None:
            return
        self._exchanged = not self._exchanged
        for weight, mean in zip(self._trained(module).values(), self._average.module.parameters(), strict=True):
            held: Tensor = weight.data.clone()
            weight.data.copy_(mean.data)
            mean.data.copy_(held)

    def _weights(self, module: L.LightningModule) -> _Weights:
        return _Weights(list(self._trained(module).values()))

    def _trained(self, module: L.LightningModule) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def over_trained_weights(callbacks: list[Callback]) -> list[Callback]:
    """Callbacks that take the places of Lightning's weight averages, over the weights that train alone.

    Args:
        callbacks: The trainer's callbacks.

    Returns:
        One for each ``WeightAveraging`` among them, of a subclass of its class: Lightning replaces a callback by one
        of a subclass that ``configure_callbacks`` returns.
    """
    made: list[Callback] = []
    for callback in callbacks:
        kind = type(callback)
        if isinstance(callback, WeightAveraging) and not isinstance(callback, _OverTrainedWeights):
            new: Callback = object.__new__(type(f"Trained{kind.__name__}", (_OverTrainedWeights, kind), {}))
            new.__dict__.update(callback.__dict__)
            made.append(new)
    return made
