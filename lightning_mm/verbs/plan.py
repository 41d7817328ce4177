"""Tells what a run will cost, before it starts and without weights, compared with every other policy.

Data flow: model, policy and data, nothing loaded -> a few real batches (or one of given lengths) -> a ``CostEstimate``
for each policy -> ``PlanResult``.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from lightning_mm.core.decisions import Decision, log_decision
from lightning_mm.core.errors import UserError, first_line
from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.execution.prepare import Compute
from lightning_mm.layer_selection.select import auto_layers_option, with_layers
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone
from lightning_mm.planning.cost_estimate import CostEstimate, MetaModel, RunSettings, estimate_cost
from lightning_mm.planning.devices import Device, find_device
from lightning_mm.training.module import MMModule
from lightning_mm.tuning import (
    ConnectorOnly,
    EarlyLayers,
    Full,
    IntermediateOnly,
    LateLayers,
    LoRAOnMiddle,
    RandomLayers,
    TuningPolicy,
    UniformSparse,
)
from lightning_mm.tuning.layers import count_layers
from lightning_mm.tuning.optimizer import OptimizerSettings
from lightning_mm.tuning.policy import TuningPlan
from lightning_mm.verbs.model_source import ModelLike, ModelSource
from lightning_mm.verbs.plan_batches import RowLengths, mean_lengths, micro_batches
from lightning_mm.verbs.plan_tables import plan_tables
from lightning_mm.verbs.result import PrintedResult, open_decisions
from lightning_mm.verbs.rows import PathLike

POLICIES: tuple[TuningPolicy, ...] = (
    Full(),
    IntermediateOnly(),
    LoRAOnMiddle(),
    ConnectorOnly(),
    EarlyLayers(),
    LateLayers(),
    UniformSparse(),
    RandomLayers(),
)
"""Every policy that a plan compares with."""


@dataclass(frozen=True, eq=False, repr=False)
class PlanResult(PrintedResult):
    """What a run will cost; ``print`` shows its tables.

    Args:
        estimates: Of the run's own policy first, then of the others.
        left_out: Policies that cannot be planned on this model, or train what another one does, with the reason.
        lengths: Of a row, on average: image_tokens, text_tokens, supervised (tokens); rows of a micro-batch; padding
            (fraction of the positions) and shared (fraction of the tokens, which a row with the same picture computes).
        device: What seconds are predicted for.
        samples: Number of training samples; 0: not known.
        steps: Micro-batches of the run; 0: not known.
        decisions: Automatic choices, with reasons.
    """

    estimates: tuple[CostEstimate, ...]
    left_out: dict[str, str]
    lengths: dict[str, float]
    device: Device
    samples: int
    steps: int
    decisions: tuple[Decision, ...]

    @property
    def own(self) -> CostEstimate:
        """The estimate of the run's own policy."""
        return self.estimates[0]

    def to_dict(self) -> dict[str, Any]:
        """Everything as ``lightning-mm plan --json`` writes it, in FLOPs, bytes and seconds."""
        return {
            "device": self.device.name,
            "utilisation": self.device.utilization,
            "shape": self.lengths,
            "samples": self.samples,
            "steps": self.steps,
            "policies": [one.to_dict() for one in self.estimates],
            "left_out": self.left_out,
        }

    def tables(self) -> list[Table | str]:
        """Operations, bytes, parts and memory, and what is left out."""
        shown = plan_tables(self.estimates, self.lengths, self.device, self.steps, self.samples)
        return [*shown, *(f"Without {policy}: {reason}" for policy, reason in self.left_out.items())]


def plan(
    model: ModelLike,
    policy: TuningPolicy | None = None,
    data: PathLike | MMDataModule | None = None,
    *,
    image_tokens: int | None = None,
    text_tokens: int | None = None,
    supervised: int | None = None,
    batch_size: int | None = None,
    image_root: PathLike | None = None,
    precision: str = "32-true",
    activation_checkpointing: bool | None = None,
    optimizer: OptimizerSettings | None = None,
    compute: Compute | None = None,
    devices: int = 1,
    accumulate_grad_batches: int = 1,
    max_steps: int = 0,
    device: str = "measured",
    compare: bool = True,
) -> PlanResult:
    """Tell what a run will cost: FLOPs, bytes and seconds of a step under its policy, and under every other one.

    Args:
        model: Model folder or hub name, a ``Backbone``, a loaded model, or an ``MMModule`` with its settings. Weights
            are not read.
        policy: Which weights train; None: the module's, else ``IntermediateOnly()``.
        data: Training conversations, or a data module: what rows are like; None: as the lengths say.
        image_tokens: Tokens of a row's picture, in place of those of the data; 0: rows without one.
        text_tokens: Tokens of a row's text, answers included, in place of those of the data.
        supervised: Tokens of a row's answers, in place of those of the data.
        batch_size: Rows of a micro-batch; None: the data module's, else 4.
        image_root: Folder that the pictures of ``data`` are relative to; None: the file's own.
        precision: The trainer's: '32-true' or 'bf16-mixed'.
        activation_checkpointing: Whether blocks are recomputed in backward; None: as the module has it, else not.
        optimizer: Its settings; None: the module's, else AdamW.
        compute: How a step is computed; None: as the module has it.
        devices: Processes that share the run.
        accumulate_grad_batches: Micro-batches of an optimizer step.
        max_steps: Optimizer steps of the run, for its whole time; 0: not known.
        device: What to predict seconds for: h200, h100, a100, l40s, rtx4090, cpu, or measured here.
        compare: Whether to tell of the other policies too; one that cannot be built is left out, with the reason.

    Raises:
        UserError: There is no such model, the policy does not fit it, or the data cannot be read.
    """
    lengths = RowLengths(image_tokens=image_tokens, text_tokens=text_tokens, supervised=supervised)
    with open_decisions() as decisions, _uncompiled():
        module = model if isinstance(model, MMModule) else None
        backbone = _backbone(model)
        run = _data(data, image_root, batch_size)
        batches = micro_batches(backbone, run, lengths, batch_size)
        bf16 = _is_bf16(precision)
        setting = RunSettings(
            compute=compute or (module.compute if module else Compute()),
            bf16=bf16,
            checkpointing=_first(activation_checkpointing, module.activation_checkpointing if module else False),
            optimizer=(optimizer or (module.optimizer if module else OptimizerSettings())).name,
            ranks=devices,
            accumulate=accumulate_grad_batches,
        )
        on = find_device(device, bf16 or backbone.dtype == "bfloat16")
        largest = max(batches, key=lambda batch: (batch.has_images, batch.regions.numel()))
        meta = MetaModel(backbone, largest, setting.compute.packing)
        own = _fixed(_policy(policy, module), meta.layout.num_layers)
        estimates = [_own(meta, own, batches, setting, on)]
        left_out = _compare(estimates, meta, batches, setting, on) if compare else {}
    samples = _rows_of_an_epoch(run) if run is not None and run.paths["train"] is not None else 0
    steps = max(0, max_steps) * accumulate_grad_batches
    return PlanResult(tuple(estimates), left_out, mean_lengths(batches), on, samples, steps, tuple(decisions))


def _rows_of_an_epoch(data: MMDataModule) -> int:
    """Rows of a training epoch; 0 where they are streamed."""
    return 0 if data.streaming else data.rows.mixture.num_rows


def _is_bf16(precision: str) -> bool:
    if precision not in ("bf16-mixed", "bf16", "32-true", "32", "None"):
        log_decision("plan.precision", "32-true", f"fit does not support {precision}")
    return precision in ("bf16-mixed", "bf16")


def _backbone(model: ModelLike) -> Backbone:
    """What names the model's config; for a loaded model, what it was loaded from."""
    if isinstance(model, MMModule):
        return model.backbone
    if isinstance(model, (str, Path)) and (str(model).endswith(".ckpt") or (Path(model) / "config.yaml").is_file()):
        raise UserError(
            f"{model} is a run.", "A plan is made before one.", "Plan its model; or: lightning-mm plan -c config.yaml"
        )
    if isinstance(model, (nn.Module, MultimodalModel)):
        inner: Any = model.model if isinstance(model, MultimodalModel) else model
        path = str(getattr(inner, "name_or_path", ""))
        bfloat16 = str(getattr(inner, "dtype", "")) == "torch.bfloat16"
        return _backbone(Backbone(path=path, dtype="bfloat16" if bfloat16 else "auto")) if path else _unknown(inner)
    source = ModelSource.of(model)
    assert source.backbone is not None
    return source.backbone


def _unknown(model: nn.Module) -> Backbone:
    kind = type(model).__name__
    raise UserError(f"It is not known where this {kind} is from.", "It says no path.", "Give the path of its folder.")


def _data(
    data: PathLike | MMDataModule | None, image_root: PathLike | None, batch_size: int | None
) -> MMDataModule | None:
    if data is None or isinstance(data, MMDataModule):
        return data
    root = None if image_root is None else str(image_root)
    return MMDataModule(train=str(data), image_root=root, batch_size=batch_size or 4, num_workers=0)


def _policy(policy: TuningPolicy | None, module: MMModule | None) -> TuningPolicy:
    if policy is not None and not isinstance(policy, TuningPolicy):
        written = policy.__name__ if isinstance(policy, type) else repr(policy)
        raise UserError(f"{written} is no tuning policy.", "A policy is an object.", "Give one, such as Full().")
    if policy is not None or module is not None:
        return policy or module.tuning  # type: ignore[union-attr]  # one of them is there
    chosen = IntermediateOnly()
    log_decision("model.tuning", chosen.describe(), "none was named; the middle is where vision meets language")
    return chosen


def _first(given: bool | None, default: bool) -> bool:
    return default if given is None else given


def _own(
    meta: MetaModel, policy: TuningPolicy, batches: Sequence[Batch], setting: RunSettings, on: Device
) -> CostEstimate:
    """The estimate of the run's own policy; whatever fails in building it is one line."""
    try:
        return estimate_cost(meta, policy, batches, setting, on)
    except (UserError, AssertionError):
        raise
    except Exception as error:
        raise UserError(
            f"{policy.describe()} cannot be built on {meta.backbone.path}.",
            f"{type(error).__name__}: {first_line(error)}",
            "Mend that (it often names a version to install), or choose another policy.",
        ) from error


def _compare(
    estimates: list[CostEstimate], meta: MetaModel, batches: Sequence[Batch], setting: RunSettings, on: Device
) -> dict[str, str]:
    """Add the estimates of all other policies; returns those that cannot be built or add nothing, with the reason."""
    left_out: dict[str, str] = {}
    for policy in POLICIES:
        try:
            one = estimate_cost(meta, policy, batches, setting, on)
        except AssertionError:
            raise
        except Exception as error:  # of PEFT or transformers: the run's own policy does not need what fails here
            reason = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
            left_out[policy.describe()] = reason
            log_decision("plan", f"without {policy.describe()}", reason)
            continue
        twin = next((each for each in estimates if _same_weights(each.plan, one.plan)), None)
        if twin is None:
            estimates.append(one)
        elif twin.census.policy != policy.describe():
            left_out[policy.describe()] = f"it trains the weights of {twin.census.policy}"
    return left_out


def _same_weights(first: TuningPlan, second: TuningPlan) -> bool:
    return (first.full, first.adapted_weights) == (second.full, second.adapted_weights)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Context without torch's compiler, which bitsandbytes would start when PEFT imports it (about a second)."""
    held = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TORCHDYNAMO_DISABLE") if held is None else os.environ.update(TORCHDYNAMO_DISABLE=held)


def _fixed(policy: TuningPolicy, num_layers: int) -> TuningPolicy:
    """The policy with ``layers: auto`` replaced by the default range: choosing layers needs weights."""
    if not auto_layers_option(policy):
        return policy
    count = count_layers("25%-50%", num_layers)
    first = num_layers // 4
    log_decision("model.tuning.layers", "25%-50%", "auto is chosen by reading the model, and plan has no weights")
    return with_layers(policy, tuple(range(first, first + count)))
