"""The models of a study, loaded to be measured, and the data module that asks them.

Data flow: folder or run -> ``MMModule`` with its weights, in eval mode; options of the fit -> ``MMDataModule``.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.training.module import MMModule
from lightning_mm.tuning.policies import ConnectorOnly
from lightning_mm.verbs.trained_run import load_run, read_options


@dataclass(frozen=True)
class Reader:
    """How the models of a study are read.

    Args:
        data: The data module of the fits, whose options the tests share.
        precision: ``trainer.precision`` of the fits.
    """

    data: MMDataModule
    precision: str

    @classmethod
    def of(cls, config: Path, content: Mapping[str, Any], model: str) -> "Reader":
        """From the options of a fit.

        Args:
            config: The file that they are in.
            content: The same, read.
            model: Folder whose processor makes the batches.
        """
        data: MMDataModule = read_options(config).data
        made = MMDataModule(**{**data.arguments, "processor": model})
        return cls(made, str(content["trainer"].get("precision")))

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The precision of the fits."""
        types = {"bf16-mixed": torch.bfloat16, "bf16": torch.bfloat16, "16-mixed": torch.float16}
        return torch.autocast(device.type, types[self.precision]) if self.precision in types else nullcontext()


def open_start(model: str, config: Path) -> MMModule:
    """A model folder, as a fit would load it, in eval mode.

    Args:
        model: The folder.
        config: Options of a fit.
    """
    asked: MMModule = read_options(config).model
    module = MMModule(
        type(asked.backbone)(**{**vars(asked.backbone), "path": model}), ConnectorOnly(), compute=asked.compute
    )
    module.configure_model()
    return _ready(module)


def open_run(run: RunDirectory, checkpoint: Path) -> MMModule:
    """The model of a fit with the weights of a checkpoint, in eval mode."""
    return _ready(load_run(run, checkpoint)[0])


def _ready(module: MMModule) -> MMModule:
    module.eval().requires_grad_(False)
    module.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return module
