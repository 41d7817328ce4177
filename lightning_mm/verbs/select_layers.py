"""Chooses the layers worth training from an untuned model, as a fit with ``layers: auto`` does.

Data flow: model + probe set (+ conversations, + a tuned model) -> hidden states, gradients -> ``Selection``.
"""

import re
from contextlib import ExitStack

from lightning_mm.core.errors import UserError
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.layer_selection.select import AutoRange, Selection, log_selection
from lightning_mm.verbs.inspected_model import ReadingOptions, open_models
from lightning_mm.verbs.model_source import ModelLike, ModelSource, ProcessorLike
from lightning_mm.verbs.result import open_decisions
from lightning_mm.verbs.rows import PathLike


def select_layers(
    model: ModelLike,
    data: PathLike | MMDataModule | None = None,
    *,
    probes: PathLike | ProbeSet | None = None,
    against: ModelLike | None = None,
    auto: AutoRange = AutoRange(),  # noqa: B008  (frozen)
    budget: int | str | None = None,
    processor: ProcessorLike | None = None,
    image_root: PathLike | None = None,
    images: int | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
    bf16: bool = False,
    checkpoint: str = "last",
) -> Selection:
    """Choose the layers worth training; ``.expression`` is the range for a policy, ``.why`` the reasons.

    Args:
        model: Model folder, hub name, run or checkpoint by its path; or a loaded model, which is left as it was.
        data: Conversations for the gradient criteria, or a data module, whose probes count too; None: those of the run;
            without any, layers are chosen by forward criteria alone.
        probes: File of pictures with captions and objects, or a ``ProbeSet``; None: that of the run or data module.
        against: A tuned model of the same kind, which adds the criteria drift and transplant.
        auto: Which criteria count, and how much compute is worth.
        budget: Exact number of layers, 8 or '25%'; None: as many as are worth their compute.
        processor: Of a loaded model; None: the one beside the weights that it was loaded from.
        image_root: Folder that the pictures of ``probes`` and ``data`` are relative to; None: each file's own folder.
        images: Most pictures; None: a run's own number, else 256.
        max_length: Longest row in tokens; None: a run's own, else 2048.
        batch_size: Rows per forward pass.
        bf16: Whether to compute forward passes in bfloat16.
        checkpoint: Of a run: name in its checkpoints, 'last' by default.

    Raises:
        UserError: There is no such model, nothing to probe with, or none of the criteria can be computed.
    """
    options = ReadingOptions(
        probes=probes,
        data=data,
        image_root=image_root,
        images=images,
        max_length=max_length,
        batch_size=batch_size,
        bf16=bf16,
    )
    if budget is not None and not re.fullmatch(r"\d+%?", str(budget)):
        raise UserError(f"budget is {budget!r}.", "It is a number of layers, or a share of them.", "Give 8 or '25%'.")
    with open_decisions(), ExitStack() as stack:
        named = [model] if against is None else [model, against]
        sources = [ModelSource.of(each, checkpoint, processor) for each in named]
        models, probe_set = open_models(sources, options, auto, stack)
        readings = [each.read(probe_set, step) for step, each in enumerate(models)]
        pilot = (models[1], readings[1]) if against is not None else None
        selection = models[0].select(readings[0], probe_set, pilot, "auto" if budget is None else f"auto:{budget}")
        log_selection(selection)
    return selection
