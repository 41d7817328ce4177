"""Replace the attention functions of a single model, under the kernel names of its config.

Data flow: attention modules of a model -> their ``forward`` with a registry of their own instead of
``ALL_ATTENTION_FUNCTIONS`` -> ``change(name, function)`` says what is called.

transformers keeps one registry of attention functions per process. A function registered there under "sdpa" changes
every model of the process; one under a new name changes what a family does with the name (MiniMax-M3-VL applies its
block mask, Gemma 4 keeps its causal mask, for the names that they know only; FlashAttention loads the kernel of that
name). So neither the registry nor the model's config is touched: every attention module of transformers looks its
function up in its own ``forward``, through the global ``ALL_ATTENTION_FUNCTIONS`` of its file, and that lookup gets a
registry of the model's own.
"""

import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from transformers import AttentionInterface

from lightning_mm.models.block_parts import ATTENTION_REGISTRY
from lightning_mm.models.hooks import Forward, replace_forward

AttentionFunction = Callable[..., Any]
"""Takes the module, query (B, H, Q, E), key and value (B, G, K, E), mask and options; returns output (B, Q, H, E) and
weights."""

Lookup = Callable[[str, AttentionFunction], AttentionFunction]
"""Returns the function of a kernel's name; the second argument is the family's eager attention."""

Change = Callable[[str, AttentionFunction, Lookup], AttentionFunction]
"""Given a kernel's name, its function and the lookup below, the function to call instead."""

_REGISTRY = ATTENTION_REGISTRY


def looks_up_attention(module: nn.Module) -> bool:
    """Whether a module's forward looks its attention function up in transformers' registry."""
    function = _function(module)
    return function is not None and _REGISTRY in function.__code__.co_names and _REGISTRY in function.__globals__


def has_eager_attention(module: nn.Module) -> bool:
    """Whether a module looks its attention function up, and its family has eager attention as well."""
    return looks_up_attention(module) and hasattr(module, "config") and eager_attention(module) is not None


def eager_attention(module: nn.Module) -> AttentionFunction | None:
    """The family's eager attention, which supports its soft-capping and sinks; None if it has none."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that look their attention function up."""
    return [module for module in model.modules() if looks_up_attention(module)]


def change_attention(undo: ExitStack, modules: Iterable[nn.Module], change: Change) -> None:
    """Replace the attention functions of some modules, until ``undo`` is closed.

    Replacements nest: ``change`` gets the function that was called before.

    Args:
        undo: Gets the callbacks that restore the modules' lookup.
        modules: Modules that satisfy ``looks_up_attention``.
        change: Returns the function to call instead; called at most once per kernel name and function.
    """
    registries: dict[int, _Registry] = {}
    copies: dict[FunctionType, FunctionType] = {}
    for module in modules:
        function = _function(module)
        assert function is not None, "modules must satisfy looks_up_attention"
        current: AttentionInterface = function.__globals__[_REGISTRY]
        registry = registries.setdefault(id(current), _Registry(current, change))
        if function not in copies:
            copies[function] = _with_registry(function, registry)
        replace_forward(undo, module, partial(_replacement, MethodType(copies[function], module)))


def write_out_masks(undo: ExitStack, configs: Iterable[Any]) -> None:
    """Let models with these configs make explicit masks, as for eager attention, until ``undo`` is closed.

    The setter of transformers would change the configs of vision towers as well.

    Args:
        undo: Gets the callbacks that restore the configs.
        configs: Configs of attention modules.
    """
    for config in configs:
        undo.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation)
        config._attn_implementation_internal = "eager"


def _replacement(forward: Forward, _: Forward) -> Forward:
    return forward


class _Registry(AttentionInterface):
    """A registry of attention functions that returns those of another registry as ``change`` replaces them."""

    def __init__(self, below: AttentionInterface, change: Change) -> None:
        super().__init__()
        self._below, self._change = below, change
        self._changed: dict[tuple[str, AttentionFunction], AttentionFunction] = {}

    def __getitem__(self, key: str) -> AttentionFunction:
        return self._made(key, self._below[key])

    def get_interface(self, attn_implementation: str, default: AttentionFunction) -> AttentionFunction:
        """The function of a kernel's name; ``default`` is the family's eager attention."""
        return self._made(attn_implementation, self._below.get_interface(attn_implementation, default))

    def _made(self, name: str, function: AttentionFunction) -> AttentionFunction:
        if (name, function) not in self._changed:
            self._changed[name, function] = self._change(name, function, self._below.get_interface)
        return self._changed[name, function]


def _function(module: nn.Module) -> FunctionType | None:
    """The plain function of a module's forward method; None if the forward is not a method."""
    forward: Forward = module.forward
    function = getattr(forward, "__func__", None)
    return function if inspect.isfunction(function) else None


def _with_registry(function: FunctionType, registry: AttentionInterface) -> FunctionType:
    """A copy of a function with another registry among its globals."""
    scope = {**function.__globals__, _REGISTRY: registry}
    # A compiler that follows globals by the name of their module would find transformers' registry again.
    scope.pop("__name__", None)
    # torch.compile keeps what it has compiled with the code object, and that refers to one scope.
    code = function.__code__.replace()
    copied = FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__, copied.__doc__, copied.__annotations__ = (
        function.__kwdefaults__,
        function.__doc__,
        function.__annotations__,
    )
    copied.__module__, copied.__qualname__ = function.__module__, function.__qualname__
    return copied
