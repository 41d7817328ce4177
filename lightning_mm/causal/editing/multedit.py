"""MultEdit: changes one association of a model by a closed-form update of one weight.

After Basu et al. 2024, arXiv:2406.04236, building on ROME (Meng et al. 2022, arXiv:2202.05262).

Data flow: a question and its new answer (``ForcedAnswer``) -> ``ValueOptimizer`` (the run, cached once) -> per layer a
key, the input of the MLP's down projection at a constraint's last token, and a value, the output it should have there
-> ``WeightEdit``, the low-rank change of that weight that maps keys to values.

W' = W + (V - W K)(K^T K + lambda I)^-1 K^T, where W K is the module's output, with bias and adapters. For one edit this
is W + (v - W k) k^T / (lambda + |k|^2): the paper's inverse of a d_ff x d_ff matrix, without the matrix.

Shapes: D hidden size, F inner size of the MLP, N edits, S recomputed tokens, T tokens of an answer, V vocabulary size.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mm.causal.editing.weight_edit import WeightEdit, closed_form_update, down_projection
from lightning_mm.causal.interventions.activation_cache import cache_activations
from lightning_mm.causal.interventions.interventions import apply_interventions
from lightning_mm.causal.interventions.partial_forward import PartialForward
from lightning_mm.causal.questions.scoring import ForcedAnswer, answer_logits
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.execution.activation_checkpointing import without_recomputation
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import logits_of

P2_LAYER = 2
"""Layer that the code of Basu et al. 2024 edits."""

Place = Literal["last", "first"]
"""Which place of a constraint that stands in the question more than once."""

P2_CLAMP = 1e-4
"""Clamp in the code of Basu et al. 2024: the value hardly moves, so hardly anything is edited."""


@dataclass(frozen=True)
class EditConfig:
    """How values are found.

    Args:
        steps: Most steps of Adam on the value.
        lr: Of Adam.
        decay: Weight of |delta| / |v0|^2 in the loss (as 2406.04236 coded it).
        clamp: The value moves by at most this many times the length of what the module put out before (ROME: 4);
            'p2' is 1e-4, as released with 2406.04236; 'none' is no limit.
        ridge: lambda of the closed form.
        target: 'answer': all tokens of the new answer, each given those before it; 'first': its first token only, as
            2406.04236 has it.
        until: Stop as soon as the loss of the target is below this many nats (ROME: 0.05); 0: never.
        place: Where key and value are, if the constraint stands in the question more than once: at the last token of
            its 'last' place, which has read all of them, or of its 'first', as released with 2406.04236.
    """

    steps: int = 25
    lr: float = 0.1
    decay: float = 0.001
    clamp: float | Literal["p2", "none"] = 4.0
    ridge: float = 0.01
    target: Literal["answer", "first"] = "answer"
    until: float = 0.05
    place: Place = "last"

    def __post_init__(self) -> None:
        sound = {
            "steps": self.steps >= 1,
            "lr": self.lr > 0,
            "decay": self.decay >= 0,
            "clamp": isinstance(self.clamp, str) or self.clamp > 0,
            "ridge": self.ridge > 0,
            "until": self.until >= 0,
        }
        for name, fits in sound.items():
            if not fits:
                raise UserError(f"edit.{name}: {getattr(self, name)} is out of range.", "See --help.", "Change it.")

    @classmethod
    def p2(cls) -> "EditConfig":
        """Settings of the code released with Basu et al. 2024, arXiv:2406.04236."""
        return cls(steps=10, clamp="p2", target="first", until=0.0, place="first")

    @property
    def limit(self) -> float:
        """Largest allowed |delta| / |v0|; inf: no limit."""
        return {"p2": P2_CLAMP, "none": float("inf")}[self.clamp] if isinstance(self.clamp, str) else self.clamp


@dataclass(frozen=True, eq=False)
class Association:
    """Key and value of one edit in one layer.

    Args:
        layer: Index of the decoder block.
        key: (F,) float32 input of the down projection at the last token of the constraint's place.
        output: (D,) float32 output of the down projection there, before the edit.
        delta: (D,) float32 change of that output; ``output + delta`` is the value.
        losses: Loss of the new answer in nats before each optimizer step, and after the last one.
    """

    layer: int
    key: Tensor
    output: Tensor
    delta: Tensor
    losses: tuple[float, ...]


class ValueOptimizer:
    """Optimizes the value of one edit, in any layer, from one cached run of the question with its new answer.

    Each step computes only the layers and tokens from the edited token on (``PartialForward``); if that is
    not exact, the whole model is run instead.

    Args:
        mm: The unwrapped model in eval mode; its weights, flags, gradients and the random state are unchanged.
        target: The question with its new answer, on the model's device.

    Raises:
        UserError: The question has no constraint.
    """

    def __init__(self, mm: MultimodalModel, target: ForcedAnswer) -> None:
        assert not mm.model.training, "dropout would make every run another one"
        self.mm, self.target = mm, target
        if not len(target.encoded.constraint):
            raise UserError(
                f"Question {target.encoded.question.id} cannot be edited.",
                "It has no constraint, whose last token the key is read at.",
                "Name the words that the answer hangs on.",
            )
        encoded = target.encoded
        self.positions: dict[Place, int] = {"last": int(encoded.constraint[-1]), "first": int(encoded.first_place[-1])}
        self.names = {b.index: b.down_proj for b in mm.layout.blocks if b.down_proj is not None}
        self._sites: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        self.partial_forward = self._cache_run()

    def association(self, layer: int, config: EditConfig) -> Association:
        """Optimize the value of one layer with Adam.

        Raises:
            UserError: The layer has no linear down projection, or its output at the constraint does not reach the
                answer.
        """
        down_projection(self.mm.model, self.names.get(layer), layer)
        position = self.positions[config.place]
        key, output = self._sites[layer][position]
        count = 1 if config.target == "first" else len(self.target.ids)
        delta = torch.zeros_like(output, requires_grad=True)
        adam, limit, losses = torch.optim.Adam([delta], config.lr), config.limit * float(output.norm()), []
        with torch.enable_grad(), frozen_parameters(self.mm):
            for step in range(config.steps + 1):
                logits_TV = self._logits(layer, position, delta)[:count]
                nll = F.cross_entropy(logits_TV, self.target.ids[:count], reduction="sum")
                losses.append(float(nll.detach()))
                if step == config.steps or losses[-1] < config.until:
                    break
                loss = nll + config.decay * delta.norm() / output.norm().square()
                (delta.grad,) = torch.autograd.grad(loss, [delta])
                if step == 0 and not delta.grad.any():
                    raise _unreachable(layer)
                adam.step()
                with torch.no_grad():
                    delta.mul_((limit / delta.norm().clamp_min(1e-30)).clamp_max(1.0))
        return Association(layer, key, output, delta.detach(), tuple(losses))

    def _logits(self, layer: int, position: int, delta: Tensor) -> Tensor:
        """(T + 1, V) logits of the target with ``delta`` added to the layer's down projection at one token."""
        name, positions = self.names[layer], self.target.positions
        if self.partial_forward is None:
            with apply_interventions(self.mm, ()), _shift_output(self.mm.model, name, position, delta):
                return answer_logits(self.mm, self.target)
        start = self.partial_forward.restart_position(position)
        with apply_interventions(self.mm, ()), _shift_output(self.mm.model, name, position - start, delta):
            hidden_SD = self.partial_forward.hidden(layer=layer, start=start)[0]
        # The question ends after its constraint, so all positions that predict the answer are recomputed.
        return logits_of(self.mm, hidden_SD[positions - start], self.partial_forward.base.returns_tuple)

    def _cache_run(self) -> PartialForward | None:
        """Read all keys and outputs, and cache the run; None if it cannot be recomputed partially."""
        inputs = self.target.encoded.inputs
        with _read_keys_and_values(self.mm.model, self.names, set(self.positions.values()), self._sites):
            try:
                base = cache_activations(self.mm, inputs, sites=("residual",))
            except UserError as error:
                with torch.no_grad(), apply_interventions(self.mm, ()):
                    self.mm.model(**inputs, use_cache=False)
                _log_full_forward(error)
                return None
        try:
            return PartialForward(self.mm, base)
        except UserError as error:
            _log_full_forward(error)
            return None


def edit_from_associations(mm: MultimodalModel, associations: Sequence[Association], ridge: float) -> WeightEdit:
    """The edit of one layer's weight that makes all associations at once.

    Args:
        mm: The unwrapped model.
        associations: Keys and values, all of one layer.
        ridge: lambda of the closed form.
    """
    (layer,) = {each.layer for each in associations}
    name = mm.layout.blocks[layer].down_proj
    down_projection(mm.model, name, layer)
    keys_FN, gaps_DN = (torch.stack(rows, 1) for rows in zip(*((a.key, a.delta) for a in associations), strict=True))
    left_DN, right_NF = closed_form_update(keys_FN, gaps_DN, ridge)
    return WeightEdit(layer, str(name), left_DN, right_NF, keys_FN, gaps_DN)


def multedit(optimizers: Sequence[ValueOptimizer], layer: int, config: EditConfig) -> WeightEdit:
    """MultEdit of one layer: all questions get their new answers at once.

    Args:
        optimizers: One for each question, all of one model.
        layer: Index of the decoder block.
        config: Settings of the optimization and the closed form.

    Raises:
        UserError: The layer cannot be edited.
    """
    associations = [each.association(layer, config) for each in optimizers]
    return edit_from_associations(optimizers[0].mm, associations, config.ridge)


@contextmanager
def frozen_parameters(mm: MultimodalModel) -> Iterator[None]:
    """Context without parameter gradients and without activation checkpointing; both are restored afterwards."""
    trainable = [parameter for parameter in mm.model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with without_recomputation(mm.model, mm.layout.layers):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def output_changed(model: nn.Module, name: str, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Context in which the module's output is ``change(input, output)``."""
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, output: change(args[0], output))
    try:
        yield
    finally:
        handle.remove()


def _shift_output(model: nn.Module, name: str, position: int, delta: Tensor) -> Any:
    """Context in which ``delta`` is added to the module's output at one token of one row."""

    def change(_: Tensor, output: Tensor) -> Tensor:
        at = torch.zeros(output.shape[:-1], device=output.device).flatten()
        at[position] = 1.0
        return (output.float() + at.view(*output.shape[:-1], 1) * delta).to(output.dtype)

    return output_changed(model, name, change)


@contextmanager
def _read_keys_and_values(
    model: nn.Module,
    names: Mapping[int, str],
    positions: Collection[int],
    sites: dict[int, dict[int, tuple[Tensor, Tensor]]],
) -> Iterator[None]:
    """Context that stores every layer's key and output at some tokens of one row in ``sites``."""

    def reading(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            keys_LF, values_LD = (x.detach().flatten(0, -2) for x in (args[0], output))
            sites[layer] = {at: (keys_LF[at].float().clone(), values_LD[at].float().clone()) for at in positions}

        return hook

    handles = [model.get_submodule(name).register_forward_hook(reading(layer)) for layer, name in names.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unreachable(layer: int) -> UserError:
    return UserError(
        f"Layer {layer} cannot be edited.",
        "What it puts out at the constraint does not reach the answer: no layer above it carries it there.",
        "Name a lower layer.",
    )


def _log_full_forward(error: UserError) -> None:
    log_decision("edit.exact", "the whole model is run at every step", error.why)
