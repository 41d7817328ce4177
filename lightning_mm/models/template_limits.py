"""Limits on a chat template, which is a program in a model's folder: it ends in seconds, or is refused.

Data flow: template -> ``refuse_unlimited``: what cannot be interrupted, by its syntax; rendering within ``limited`` ->
the text, or ``TemplateLimitError`` where it takes too long, too much memory, or writes too much.

transformers renders in a sandbox of jinja2, which keeps a template from files and from Python, not from looping.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

import torch
from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2.0
"""Processor time of one rendering; a long conversation takes some milliseconds."""
MOST_BYTES = 2**28
"""Memory that one rendering may take beside what the process has."""
MOST_CHARACTERS = 2**24
"""Of the text that it writes."""
_STATM = Path("/proc/self/statm")


class TemplateLimitError(TemplateError):
    """A chat template that takes more than any conversation needs."""


class _Generation(Extension):
    """transformers' ``{% generation %}``, read as a plain block."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse_unlimited(template: str) -> None:
    """Refuse powers, which can take hours within one step that no limit of time interrupts.

    Args:
        template: Text of a chat template; one that is no jinja2 is left to its rendering.

    Raises:
        TemplateLimitError: It names the line.
    """
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(template)
    except (TemplateError, RecursionError):
        return
    for power in tree.find_all(nodes.Pow):
        raise TemplateLimitError(f"line {power.lineno} of the template computes a power, which may never end")
    for rounded in tree.find_all(nodes.Filter):
        if rounded.name == "round" and (rounded.args or rounded.kwargs):
            raise TemplateLimitError(f"line {rounded.lineno} of the template rounds to digits, which may never end")


@contextmanager
def limited(*, memory: bool) -> Iterator[None]:
    """While active, what this thread computes ends within ``SECONDS`` of processor time and ``MOST_BYTES`` of memory.

    Time is limited in the main thread only, where Python handles signals; workers of a DataLoader have one of their
    own. Memory is limited on Linux before CUDA is used, whose driver maps much more than it takes.

    Args:
        memory: Whether memory is limited. The limit is the whole process's, so that threads beside this one may hit it.

    Raises:
        TemplateLimitError: It did not.
    """
    with _limited_memory() if memory else nullcontext():
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGVTALRM"):
            yield
            return
        before = signal.signal(signal.SIGVTALRM, _too_long)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """The soft limit of this process's address space, lowered to what it has and ``MOST_BYTES`` more."""
    if not _STATM.is_file() or torch.cuda.is_initialized():
        yield
        return
    import resource  # not on every system

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(_STATM.read_text().split()[0]) * resource.getpagesize() + MOST_BYTES
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    except MemoryError as error:
        raise TemplateLimitError(f"it takes more than {MOST_BYTES // 2**20} MiB") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TemplateLimitError(f"it does not end within {SECONDS:.0f} s")
