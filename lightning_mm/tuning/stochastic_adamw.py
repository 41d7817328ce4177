"""AdamW for bfloat16 weights: updates are computed in float32 and rounded stochastically, so that small ones count.

Data flow: weights, gradients and moments of a bucket, widened to float32 -> AdamW -> rounded up or down with the
probability that keeps the mean -> stored.

bfloat16 has 8 significant bits: a step below 2^-9 of its weight would always be rounded away. Rounded stochastically,
it moves the weight with a probability in proportion to its size (Zamirai et al. 2020, arXiv:2010.06192). The noise
depends on the seed and the number of the step alone: every rank draws the same, and a resumed run draws what an
uninterrupted one would.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

_BUCKET = 2**24
"""Elements that are in float32 at a time."""


class StochasticAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) with stochastic rounding of bfloat16 weights and moments.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        state_dtype: Type of the moments.
        seed: Of the rounding noise.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: Literal["float32", "bfloat16"] = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self.state_dtype: torch.dtype = getattr(torch, state_dtype)
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        count = 0
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            group["step"] += bool(moved)
            for bucket in _buckets(moved):
                self._update(bucket, group, self._noise(bucket[0].device, group["step"], count))
                count += 1
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any], noise: torch.Generator) -> None:
        lr, (beta1, beta2), step = group["lr"], group["betas"], group["step"]
        states = [self._state(param) for param in params]
        weights, firsts, seconds = (
            [held.float() for held in each]
            for each in (params, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states])
        )
        gradients = [param.grad.float() for param in params if param.grad is not None]
        torch._foreach_lerp_(firsts, gradients, 1 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1 - beta2)
        roots = torch._foreach_sqrt(seconds)
        torch._foreach_div_(roots, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(weights, firsts, roots, -lr / (1 - beta1**step))
        for param, state, *wide in zip(params, states, weights, firsts, seconds, strict=True):
            for held, value in zip((param, state["exp_avg"], state["exp_avg_sq"]), wide, strict=True):
                stochastic_round_(held, value, noise)

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, dtype=self.state_dtype)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments in ``state_dtype``; torch alone would cast them to their parameter's type."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[param][name] = value.to(param.device, self.state_dtype, copy=True)

    def _noise(self, device: torch.device, step: int, bucket: int) -> torch.Generator:
        """The device's generator, seeded for this step and bucket."""
        made = self._generators.setdefault(device, torch.Generator(device))
        return made.manual_seed(((self.seed * 1_000_003 + step) * 1_000_003 + bucket) % 2**63)


def stochastic_round_(held: Tensor, value: Tensor, noise: torch.Generator) -> None:
    """Copy float32 values into a tensor in place, rounded stochastically where it is bfloat16.

    Args:
        held: Destination of any shape, bfloat16 or float32.
        value: Source of the same shape, float32; may be ``held`` itself where that is float32.
        noise: Generator on the values' device.
    """
    if held.dtype != torch.bfloat16:
        if held.data_ptr() != value.data_ptr():
            held.copy_(value)
        return
    bits = value.contiguous().view(torch.int32)
    # bfloat16 is the upper half of float32: noise added to the lower half carries over in proportion to that half.
    below = torch.empty_like(bits).random_(0, 1 << 16, generator=noise)
    held.copy_(below.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32))


def _buckets(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of parameters on one device, up to ``_BUCKET`` elements together."""
    bucket: list[Tensor] = []
    size = 0
    for param in params:
        if bucket and (size + param.numel() > _BUCKET or param.device != bucket[0].device):
            yield bucket
            bucket, size = [], 0
        bucket.append(param)
        size += param.numel()
    if bucket:
        yield bucket
