"""MultEdit: one association of a model changed in one weight, in closed form (2406.04236).

Data flow: a question and its new answer (``Forced``) -> ``Rewriting`` (the run written down once) -> per layer a key,
what enters the MLP's down projection at the constraint's last token, and a value, what it should put out there instead
-> ``Edit``, the low-rank change of that weight which maps keys to values -> ``edited``, for as long as a context lasts.

W' = W + (V - W K)(K^T K + lambda I)^-1 K^T, in which W K is what the module puts out, with bias and adapters. For one
edit that is W + (v - W k) k^T / (lambda + |k|^2): P2's inverse of a d_ff x d_ff matrix, without the matrix.

Shapes: D hidden size, F inner size of the MLP, N edits, T tokens of an answer, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mm.causal.editing.weight_edit import Edit, down_projection, low_rank
from lightning_mm.causal.interventions.activation_cache import record
from lightning_mm.causal.interventions.interventions import intervened
from lightning_mm.causal.interventions.partial_forward import Replay
from lightning_mm.causal.questions.scoring import Forced, forced_logits
from lightning_mm.core.decisions import decide
from lightning_mm.core.errors import UserError
from lightning_mm.execution.activation_checkpointing import activations_kept
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import logits_of

P2_CLAMP = 1e-4
"""As 2406.04236 released it: the value hardly moves, so hardly anything is edited."""


@dataclass(frozen=True)
class EditOptions:
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
    """

    steps: int = 25
    lr: float = 0.1
    decay: float = 0.001
    clamp: float | Literal["p2", "none"] = 4.0
    ridge: float = 0.01
    target: Literal["answer", "first"] = "answer"
    until: float = 0.05

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
    def p2(cls) -> "EditOptions":
        """As 2406.04236 released it."""
        return cls(steps=10, clamp="p2", target="first", until=0.0)

    @property
    def limit(self) -> float:
        """Largest |delta| / |v0|."""
        return {"p2": P2_CLAMP, "none": float("inf")}[self.clamp] if isinstance(self.clamp, str) else self.clamp


@dataclass(frozen=True, eq=False)
class Association:
    """What one layer is to put out for one key.

    Args:
        layer: The decoder block.
        key: (F,) float32, what enters its down projection at the constraint's last token.
        output: (D,) float32, what it puts out there.
        delta: (D,) float32, what is to be added.
        losses: Of the target in nats, before each step; the last one is what the value comes to.
    """

    layer: int
    key: Tensor
    output: Tensor
    delta: Tensor
    losses: tuple[float, ...]


class Rewriting:
    """One question whose answer is to be another one: its run written down, from which values at any layer follow.

    Gradients are computed from the constraint's last token and the layer on only; what stands before is as recorded.
    Where that is not exact (``Replay`` says why), the whole model is run instead.

    Args:
        model: The plain model in eval mode; its weights, flags and gradients, and the random state, are left alone.
        layout: Of it.
        target: The question with its new answer, on the model's device.

    Raises:
        UserError: The question has no constraint.
    """

    def __init__(self, mm: MultimodalModel, target: Forced) -> None:
        assert not mm.model.training, "dropout would make every run another one"
        self.mm, self.target = mm, target
        if not len(target.asked.constraint):
            raise UserError(
                f"Question {target.asked.question.id} cannot be edited.",
                "It has no constraint, whose last token the key is read at.",
                "Name the words that the answer hangs on.",
            )
        self.position = int(target.asked.constraint[-1])
        self.names = {b.index: b.down_proj for b in mm.layout.blocks if b.down_proj is not None}
        self._sites: dict[int, tuple[Tensor, Tensor]] = {}
        self.replay = self._recorded()

    def association(self, layer: int, options: EditOptions) -> Association:
        """Find the value of one layer.

        Raises:
            UserError: The layer has no plain down projection, or what it puts out at the constraint reaches no answer.
        """
        down_projection(self.mm.model, self.names.get(layer), layer)
        key, output = self._sites[layer]
        count = 1 if options.target == "first" else len(self.target.ids)
        delta = torch.zeros_like(output, requires_grad=True)
        adam, limit, losses = torch.optim.Adam([delta], options.lr), options.limit * float(output.norm()), []
        with torch.enable_grad(), frozen(self.mm):
            for step in range(options.steps + 1):
                logits_TV = self._logits(layer, delta)[:count]
                nll = F.cross_entropy(logits_TV, self.target.ids[:count], reduction="sum")
                losses.append(float(nll.detach()))
                if step == options.steps or losses[-1] < options.until:
                    break
                loss = nll + options.decay * delta.norm() / output.norm().square()
                (delta.grad,) = torch.autograd.grad(loss, [delta])
                if step == 0 and not delta.grad.any():
                    raise _unread(layer)
                adam.step()
                with torch.no_grad():
                    delta.mul_((limit / delta.norm().clamp_min(1e-30)).clamp_max(1.0))
        return Association(layer, key, output, delta.detach(), tuple(losses))

    def _logits(self, layer: int, delta: Tensor) -> Tensor:
        """(T + 1, V) of the target with the value moved."""
        name, positions = self.names[layer], self.target.positions
        if self.replay is None:
            with intervened(self.mm, ()), _moved(self.mm.model, name, self.position, delta):
                return forced_logits(self.mm, self.target)
        start = self.replay.start_for(self.position)
        with intervened(self.mm, ()), _moved(self.mm.model, name, self.position - start, delta):
            hidden_SD = self.replay.hidden(layer=layer, start=start)[0]
        # A question's last token stands behind its constraint, so all that is foretold is computed again.
        return logits_of(self.mm, hidden_SD[positions - start], self.replay.base.tuples)

    def _recorded(self) -> Replay | None:
        inputs = self.target.asked.inputs
        with _read(self.mm.model, self.names, self.position, self._sites):
            try:
                base = record(self.mm, inputs, sites=("residual",))
            except UserError as error:
                with torch.no_grad(), intervened(self.mm, ()):
                    self.mm.model(**inputs, use_cache=False)
                _say_why(error)
                return None
        try:
            return Replay(self.mm, base)
        except UserError as error:
            _say_why(error)
            return None


def edit_of(mm: MultimodalModel, associations: Sequence[Association], ridge: float) -> Edit:
    """The change of one layer's weight that serves all associations at once.

    Args:
        mm: The plain model.
        associations: Of one layer.
        ridge: lambda.
    """
    (layer,) = {each.layer for each in associations}
    name = mm.layout.blocks[layer].down_proj
    down_projection(mm.model, name, layer)
    keys_FN, gaps_DN = (torch.stack(rows, 1) for rows in zip(*((a.key, a.delta) for a in associations), strict=True))
    left_DN, right_NF = low_rank(keys_FN, gaps_DN, ridge)
    return Edit(layer, str(name), left_DN, right_NF, keys_FN, gaps_DN)


def rewritten(rewritings: Sequence[Rewriting], layer: int, options: EditOptions) -> Edit:
    """MultEdit of one layer: all questions at once get their new answers.

    Raises:
        UserError: The layer cannot be edited.
    """
    first = rewritings[0]
    found = [each.association(layer, options) for each in rewritings]
    return edit_of(first.mm, found, options.ridge)


@contextmanager
def frozen(mm: MultimodalModel) -> Iterator[None]:
    """While active, no parameter asks for a gradient and no block is recomputed; what was so is put back."""
    asking = [parameter for parameter in mm.model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        with activations_kept(mm.model, mm.layout.layers):
            yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def answering(model: nn.Module, name: str, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """While active, the module puts out ``change(what enters it, what it puts out)``."""
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, output: change(args[0], output))
    try:
        yield
    finally:
        handle.remove()


def _moved(model: nn.Module, name: str, position: int, delta: Tensor) -> Any:
    """``delta`` is added to what the module puts out at one token of one row."""

    def change(_: Tensor, output: Tensor) -> Tensor:
        at = torch.zeros(output.shape[:-1], device=output.device).flatten()
        at[position] = 1.0
        return (output.float() + at.view(*output.shape[:-1], 1) * delta).to(output.dtype)

    return answering(model, name, change)


@contextmanager
def _read(
    model: nn.Module, names: Mapping[int, str], position: int, sites: dict[int, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Every layer's key and value at one token of one row."""

    def reading(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            key, value = (x.detach().flatten(0, -2)[position].float().clone() for x in (args[0], output))
            sites[layer] = key, value

        return hook

    handles = [model.get_submodule(name).register_forward_hook(reading(layer)) for layer, name in names.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unread(layer: int) -> UserError:
    return UserError(
        f"Layer {layer} cannot be edited.",
        "What it puts out at the constraint does not reach the answer: no layer above it carries it there.",
        "Name a lower layer.",
    )


def _say_why(error: UserError) -> None:
    decide("edit.exact", "the whole model is run at every step", error.why)
