"""Start a new connector at the volume of the stream that its tokens join.

The first decoder block adds far more to a token than the token is: SmolLM2's turns word embeddings of norm 3 into
states of norm 40. What a connector of word-like norm says is drowned there, and its first steps are spent on growing.
``stream_norm`` scales the connector's last linear map so that picture tokens enter the first block with the mean norm
that words have behind it. Where the connector begins with a layer norm, its weight and bias are set before that, so
that each feature of the tower has mean 0 and standard deviation 1 over the picture tokens of some rows: features
differ by an order of magnitude between the tower's layers, and the smaller ones would be learned late.

Data flow: a sentence -> words behind block 0; a picture -> what enters block 0 -> two mean norms -> their ratio -> the
linear map's weight and bias. The map is found by what it does: of the connector's modules with a matrix, the last one
whose parameters, doubled, double the picture tokens.

Shapes: B rows, L tokens, D hidden size, T picture tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch
from lightning_mm.data.chat import ChatRenderer
from lightning_mm.data.sample import IMAGE_MARK, Turn
from lightning_mm.execution.cache.frozen_prefix import temporary_eval_mode
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import block_io
from lightning_mm.models.layout import Region
from lightning_mm.tuning.policy import TuningPlan

ConnectorInit = Literal["keep", "stream_norm"]

_SENTENCE = (
    "Two people walk along the river, past a small house with a red roof, and talk about the weather of last week."
)
_OPTION = "model.connector_init"
_LEAST_DEVIATION = 0.1
"""Of the median deviation of a feature; what varies less is not made larger than that."""

Agree = Callable[[Any], Any]


@dataclass(frozen=True)
class StreamScale:
    """A connector's last linear map, and the norms that its scale follows from.

    Args:
        parameters: Names of its weight and, if it has one, bias.
        words: Mean norm of the words of a sentence behind the first decoder block.
        pictures: Mean norm of the picture tokens that it makes.
    """

    parameters: tuple[str, ...]
    words: float
    pictures: float

    @property
    def factor(self) -> float:
        """What the map is multiplied by."""
        return self.words / self.pictures


@torch.no_grad()
def scale_connector(
    mm: MultimodalModel,
    plan: TuningPlan,
    batch: Batch | None = None,
    agree: Agree = lambda measured: measured,
) -> StreamScale:
    """Scale the last linear map of the connector, in place, so that picture tokens enter at the stream's norm.

    Args:
        mm: The model under its plan, with its processor.
        plan: What trains; the map must, or no checkpoint would hold it.
        batch: Rows with pictures to measure on, on the model's device; None (default) takes a synthetic picture.
        agree: Returns what all ranks use, given what this one has measured; by default its own.

    Raises:
        UserError: The connector does not train as a whole, or does not end in a linear map.
    """
    if plan.modes[Region.CONNECTOR] != "full":
        raise UserError(
            f"{_OPTION}: stream_norm needs a connector that trains.",
            f"It is {plan.modes[Region.CONNECTOR]} here, so that no checkpoint would hold the scaled one.",
            "Use ConnectorOnly, or set model.tuning.connector full; or leave model.connector_init at keep.",
        )
    with temporary_eval_mode(mm.model, mm.device):
        inputs = _picture_inputs(mm) if batch is None or not batch.has_images else batch.inputs
        _standardize_features(mm, inputs, plan.full, agree)
        parameters, pictures_TD = _last_linear(mm, inputs, plan.full)
        words = _mean_norm(_words_behind_first_block(mm))
    words, pictures = agree((words, _mean_norm(pictures_TD)))
    if not pictures:
        raise _refusal(mm, f"{parameters[0]} makes picture tokens that are all zero")
    scale = StreamScale(parameters, words, pictures)
    for name in parameters:
        mm.model.get_parameter(name).mul_(scale.factor)
    log_decision(
        _OPTION,
        f"stream_norm: {parameters[0]} x {scale.factor:.3g}",
        f"its picture tokens had norm {pictures:.3g}, words behind block 0 have {words:.3g}",
    )
    return scale


def _standardize_features(
    mm: MultimodalModel, inputs: Mapping[str, Tensor], trained: frozenset[str], agree: Agree
) -> None:
    """Set weight and bias of the layer norm that the connector begins with, in place; nothing where it has none."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in mm.layout.parameters_in(Region.CONNECTOR))
    modules = [name for name in owners if not any(mm.model.get_submodule(name).children())]
    called: list[tuple[str, Tensor]] = []
    handles = [
        mm.model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: called.append((name, args[0]))
        )
        for name in modules
    ]
    try:
        _states(mm, inputs, 0)
    finally:
        for handle in handles:
            handle.remove()
    norm = mm.model.get_submodule(called[0][0]) if called else None
    if not isinstance(norm, nn.LayerNorm) or norm.bias is None or norm.weight.ndim != 1 or len(modules) < 2:
        return
    name = called[0][0]
    if f"{name}.weight" not in trained or f"{name}.bias" not in trained:
        return
    features = [
        nn.functional.layer_norm(each.float(), norm.normalized_shape, eps=norm.eps) for n, each in called if n == name
    ]
    features_TD = torch.cat([each.flatten(0, -2) for each in features])
    deviation_D, mean_D = torch.std_mean(features_TD, dim=0)
    deviation_D = deviation_D.clamp_min(_LEAST_DEVIATION * float(deviation_D.median()))
    weight, bias = agree((deviation_D.reciprocal().tolist(), (-mean_D / deviation_D).tolist()))
    norm.weight.copy_(torch.tensor(weight))
    norm.bias.copy_(torch.tensor(bias))
    log_decision(
        _OPTION,
        f"{name}: {len(mean_D)} features with mean 0 and standard deviation 1",
        f"over {len(features_TD)} picture tokens; deviations were {deviation_D.min():.2g} to {deviation_D.max():.2g}",
    )


def _last_linear(
    mm: MultimodalModel, inputs: Mapping[str, Tensor], trained: frozenset[str]
) -> tuple[tuple[str, ...], Tensor]:
    """Names of the parameters of the connector's last linear map, and the picture tokens (T, D) that it makes."""
    before_TD = _entering_pictures(mm, inputs)
    for names in reversed(_matrices(mm)):
        with _doubled(mm.model, names):
            after_TD = _entering_pictures(mm, inputs)
        doubled_T = torch.isclose(after_TD, 2 * before_TD, rtol=1e-3, atol=0).all(-1) & before_TD.any(-1)
        # The others are marks of a row's or a tile's end, which stand between its tokens and must stay as they are.
        if doubled_T.sum() * 2 > len(doubled_T) and torch.equal(after_TD[~doubled_T], before_TD[~doubled_T]):
            if untrained := sorted(set(names) - trained):
                raise _refusal(mm, f"{untrained[0]} stays as it is")
            return names, before_TD[doubled_T]
    if not len(before_TD):
        raise _refusal(mm, "its pictures do not enter the first block as tokens")
    raise _refusal(
        mm, "no linear map of its connector scales the picture tokens: a norm stands behind it, or none does"
    )


def _matrices(mm: MultimodalModel) -> list[tuple[str, ...]]:
    """Parameters of each module of the connector that holds a matrix itself, in the model's order."""
    by_module: dict[str, list[str]] = {}
    for name in mm.layout.parameters_in(Region.CONNECTOR):
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    held = [tuple(names) for names in by_module.values()]
    return [names for names in held if any(mm.model.get_parameter(name).ndim > 1 for name in names)]


@contextmanager
def _doubled(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """While active, some parameters are twice what they are."""
    before = {name: model.get_parameter(name).clone() for name in names}
    try:
        for name in names:
            model.get_parameter(name).mul_(2)
        yield
    finally:
        for name, value in before.items():
            model.get_parameter(name).copy_(value)


class _SeenError(Exception):
    """Ends a forward pass at the states that were asked for."""


def _states(mm: MultimodalModel, inputs: Mapping[str, Tensor], index: int) -> Tensor:
    """Hidden states (B, L, D) of a slice, as ``block_io`` counts them; nothing behind them is computed."""
    seen: list[Tensor] = []

    def stop(_: int, states: Tensor) -> None:
        seen.append(states)
        raise _SeenError

    with suppress(_SeenError), block_io(mm, stop, {index}):
        mm.model(**inputs, use_cache=False)
    return seen[0]


def _entering_pictures(mm: MultimodalModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """What enters the first block at the places of pictures (T, D), in float32."""
    ids_BL = inputs["input_ids"]
    places_BL = torch.isin(ids_BL, torch.tensor(mm.required_processor.image_token_ids, device=ids_BL.device))
    return _states(mm, inputs, 0)[places_BL].float()


def _words_behind_first_block(mm: MultimodalModel) -> Tensor:
    """States (L, D) of the words of a sentence behind the first block, in float32.

    Without the first token, on which many models put states of a size of their own.
    """
    encoded = mm.required_processor.processor.tokenizer(_SENTENCE, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return _states(mm, mm.on_device(inputs), 1)[0, 1:].float()


def _picture_inputs(mm: MultimodalModel) -> dict[str, Tensor]:
    """A question about a synthetic picture: colors that run across it in three directions."""
    ramp = np.linspace(0, 255, 224)
    red, green = np.meshgrid(ramp, ramp)
    picture = Image.fromarray(np.stack([red, green, 255 - (red + green) / 2], -1).astype(np.uint8))
    turn = Turn("user", f"{IMAGE_MARK}\nWhat is it?")
    text = ChatRenderer(mm.required_processor).render((turn,), add_generation_prompt=True).text
    return mm.on_device(mm.required_processor.encode([text], [[picture]], "right").inputs)


def _mean_norm(states: Tensor) -> float:
    return float(states.norm(dim=-1).mean())


def _refusal(mm: MultimodalModel, why: str) -> UserError:
    family = mm.transformers.config.model_type
    return UserError(
        f"{_OPTION}: stream_norm cannot be had for {family}.",
        why[0].upper() + why[1:] + ".",
        "Leave model.connector_init at keep.",
    )
