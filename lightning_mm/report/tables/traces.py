"""Causal traces: traces.json read and checked, one trace at a time, and a trace saved as a picture file of its own.

Data flow: traces.json (``causal.effects`` writes it) -> ``Trace`` -> ``trace_maps`` draws it -> report.html, or a file.
Contents may be half written or not ours: what is no trace is counted with its reason, and the others are drawn.

Shapes: L layers, T tokens (one of them may stand for a run of a picture's tokens).
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_mm.core.layer_table import MOST_LAYERS
from lightning_mm.core.measure_catalog import MODULE_SITES
from lightning_mm.report.tables.panels import EMBEDDINGS

_LONGEST, _MOST_TOKENS, _MOST_CELLS = 400, 20_000, 1_000_000
_MEASURES = {
    "nie": "share of the lost probability that comes back",
    "ie": "probability that comes back",
    "ie_logit": "share of the lost logit difference that comes back",
}


@dataclass(frozen=True)
class Trace:
    """How much of one question's answer comes back where a part of the clean run is put back.

    Args:
        id: The question's.
        text: The question.
        constraint: The words that its answer depends on.
        image: File under pictures/; empty where there is none.
        site: What is put back: mlp, attention or residual.
        measure: nie, ie or ie_logit.
        window: Which layers are put back together, such as p2:1 or rome:10.
        target: The token whose probability is followed.
        p_clean: Its probability in the clean run; None where it is not told.
        p_corrupt: In the corrupt run.
        layers: (L,) ascending.
        tokens: (T,) their texts; empty for a picture's.
        classes: (T,) what each is, of ``places.CLASSES``.
        positions: (T,) where each stands in the prompt, or begins.
        sizes: (T,) how many tokens each stands for: 1, but for runs of a picture's tokens that were put back together.
        values: (L, T); None is undefined.
        undefined: Why some are undefined.
    """

    id: str
    text: str
    constraint: str
    image: str
    site: str
    measure: str
    window: str
    target: str
    p_clean: float | None
    p_corrupt: float | None
    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    classes: tuple[str, ...]
    positions: tuple[int, ...]
    sizes: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]
    undefined: str = "not computed, or no number"

    @classmethod
    def of(cls, raw: Any) -> "Trace":
        """From an item of traces.json.

        Raises:
            LookupError, TypeError, ValueError, AttributeError, ArithmeticError: If it is none.
        """
        tokens = tuple(str(token)[:_LONGEST] for token in raw["tokens"])
        trace = cls(
            id=_text(raw, "id"),
            text=_text(raw, "text"),
            constraint=_text(raw, "constraint"),
            image=_text(raw, "image"),
            site=_text(raw, "site"),
            measure=_text(raw, "measure"),
            window=_text(raw, "window"),
            target=_text(raw, "target"),
            p_clean=finite(raw.get("p_clean")),
            p_corrupt=finite(raw.get("p_corrupt")),
            layers=tuple(int(layer) for layer in raw["layers"]),
            tokens=tokens,
            classes=tuple(str(kind)[:40] for kind in raw.get("classes") or [""] * len(tokens)),
            positions=tuple(int(p) for p in raw.get("positions") or range(len(tokens))),
            sizes=tuple(max(1, int(n)) for n in raw.get("sizes") or [1] * len(tokens)),
            values=tuple(tuple(finite(value) for value in row) for row in raw["values"]),
            undefined=_text(raw, "undefined") or cls.undefined,
        )
        trace.check()
        return trace

    def check(self) -> None:
        """Raises ValueError if its parts do not fit each other."""
        layers, count = self.layers, len(self.tokens)
        if not layers or not count:
            raise ValueError("no layers or no tokens")
        if list(layers) != sorted(set(layers)) or layers[0] < EMBEDDINGS or layers[-1] >= MOST_LAYERS:
            raise ValueError("layers are not ascending numbers of layers")
        if len(self.values) != len(layers) or any(len(row) != count for row in self.values):
            raise ValueError("values do not fit the layers and tokens")
        if {len(self.classes), len(self.positions), len(self.sizes)} != {count}:
            raise ValueError("classes, positions or sizes do not fit the tokens")
        if count > _MOST_TOKENS or count * len(layers) > _MOST_CELLS:
            raise ValueError(f"{count:,} tokens are too many to draw")

    @property
    def title(self) -> str:
        return f"{MODULE_SITES.get(self.site, self.site[:40])} put back"

    @property
    def summary(self) -> str:
        """What its colors stand for, and which layers are put back together."""
        measured = _MEASURES.get(self.measure, self.measure[:40])
        return "; ".join(filter(None, (measured, window_words(self.window))))

    @cached_property
    def strongest(self) -> tuple[int, int] | None:
        """Indices of the layer and token where most comes back; None where nothing does."""
        some = ((v, -i, -j) for i, row in enumerate(self.values) for j, v in enumerate(row) if v is not None and v > 0)
        best = max(some, default=None)
        return (-best[1], -best[2]) if best else None


def _text(raw: Any, key: str) -> str:
    return str(raw.get(key) or "")[:_LONGEST]


def read_traces(raw: Any, most: int) -> tuple[list[Trace], int, list[str]]:
    """The first ``most`` traces of traces.json, how many follow, and what cannot be read of it until there.

    Raises:
        ValueError: If it is no list at all.
    """
    if not isinstance(raw, list):
        raise ValueError("it holds no list of traces")
    found: list[Trace] = []
    faults: Counter[str] = Counter()
    left = 0
    for number, item in enumerate(raw):
        if len(found) == most:
            left = len(raw) - number
            break
        try:
            found.append(Trace.of(item))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            faults[f"{type(error).__name__}: {str(error)[:120]}"] += 1
    return found, left, [f"{n} of {len(raw)} traces cannot be read ({why})." for why, n in faults.most_common(6)]


def window_words(window: str) -> str:
    """Which layers are put back together, with the name of the convention.

    Example:
        >>> window_words("p2:1"), window_words("p2:3"), window_words("rome:10"), window_words("mine")
        ('one layer at a time (P2)', '7 layers at a time (P2, w = 3)', '10 layers at a time (ROME)', 'window mine')
    """
    name, _, width = window.partition(":")
    if not width.isdecimal() or not 0 < int(width) < MOST_LAYERS or name not in ("p2", "rome"):
        return f"window {window[:40]}" if window else ""
    layers = 2 * int(width) + 1 if name == "p2" and width != "1" else int(width)
    many = "one layer" if layers == 1 else f"{layers} layers"
    return f"{many} at a time ({name.upper()}{f', w = {width}' if name == 'p2' and layers > 1 else ''})"


def finite(value: Any) -> float | None:
    """A number that can be drawn; None for one that is missing, endless, or none."""
    if value is None or isinstance(value, bool):
        return None
    number = float(value)
    return number if math.isfinite(number) and abs(number) < 1e100 else None
