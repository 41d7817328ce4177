"""Run a model without leaving a trace in it, whoever trains it and however it is wrapped.

Data flow: a module -> ``without_side_effects`` (forward passes in eval mode, without gradients) or ``restoring_state``
(in its own modes) -> the module, the random generators and autocast as they were.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_mm.core.random_state import restore_rng, rng_state


@contextmanager
def without_side_effects(root: nn.Module) -> Iterator[None]:
    """Context with all modules in eval mode and without gradients, which leaves no trace; see ``restoring_state``.

    Modes are set as flags: a ``train`` or ``eval`` that a module overrides (to merge adapters, say) is not called.

    Args:
        root: The model, or a module that holds it.
    """
    with restoring_state(root), torch.no_grad():
        for module in root.modules():
            module.training = False
        yield


@contextmanager
def restoring_state(root: nn.Module) -> Iterator[None]:
    """Context that may run the model, in the modes that it is in.

    On exit the train/eval mode of each module, its plain attributes, its hooks and the identity of its buffers (what a
    forward pass remembers, such as Qwen-VL's rope deltas, a grown rotary table, or the hooks that transformers sets in
    a model's first pass, with the mark that it has) and all random generators are as before.
    Autocast around it stays on, but caches no weights: those cast here would have no gradient in the step to come.

    Args:
        root: The model, or a module that holds it.
    """
    generators, cached = rng_state(), torch.is_autocast_cache_enabled()
    remembered = [(module, dict(vars(module)), _contents(module)) for module in root.modules()]
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        for module, attributes, contents in remembered:
            _restore(vars(module), attributes)
            for name, content in contents.items():
                _restore(attributes[name], content)
        torch.set_autocast_cache_enabled(cached)
        restore_rng(generators)


def _contents(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """What a module's dictionaries of buffers and hooks hold, by the names of the dictionaries."""
    held = {name: value for name, value in vars(module).items() if name == "_buffers" or "hooks" in name}
    return {name: dict(value) for name, value in held.items() if isinstance(value, dict)}


def _restore(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    if now.keys() != before.keys() or any(now[name] is not value for name, value in before.items()):
        now.clear()
        now.update(before)
