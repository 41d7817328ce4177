"""Tables of coverage, size and power for the docs.

Data flow: benchmarks/calibration.json -> Markdown: one table per family and size, one row per statistic and design.
"""

from typing import Any

from scipy.stats import binom

_COLUMNS = (("null", "coverage"), ("planted", "coverage"), ("null", "outside"), ("null", "size"), ("planted", "power"))
_TITLES = ("covers, null", "covers, planted", "outside chance", "size", "power")
LEAST_COVERED, MOST_COVERED, SIZE = 0.93, 0.97, 0.05
"""Shares that are as they should be: of intervals that cover, of nothing that is called found."""

_RARE = 0.001
"""How rarely a right statistic would be called false; there are some thousand shares."""

_WORDS = {"coverage": "covers", "outside": "is outside chance", "size": "is called found"}


def tables(cases: dict[str, Any]) -> str:
    """Markdown of all cases.

    Args:
        cases: By name, as ``tally`` makes them.
    """
    blocks: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for name, case in cases.items():
        family, size, design, kind = name.split("/")
        blocks.setdefault((family, size), {}).setdefault(design, {})[kind] = case
    return "\n\n".join(_block(family, size, designs) for (family, size), designs in blocks.items())


def _block(family: str, size: str, designs: dict[str, dict[str, Any]]) -> str:
    models = sorted({case["models"] for kinds in designs.values() for case in kinds.values()})
    told = " to ".join(str(n) for n in dict.fromkeys((models[0], models[-1])))
    lines = [f"### {family[0].upper()}{family[1:]}, N = {size}", "", f"{told} models of each design:", ""]
    for design, kinds in designs.items():
        lines += [f"- {design}, {kind}: {case['about']}." for kind, case in kinds.items()]
    lines += ["", f"| statistic | design | {' | '.join(_TITLES)} |", "|---" * (2 + len(_TITLES)) + "|"]
    names = dict.fromkeys(name for kinds in designs.values() for case in kinds.values() for name in case["statistics"])
    for name in names:
        for design, kinds in designs.items():
            cells = [_cell(kinds.get(kind, {}).get("statistics", {}).get(name, {}), what) for kind, what in _COLUMNS]
            if any(cell != "–" for cell in cells):
                lines.append(f"| {name} | {design} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(entry: dict[str, Any], what: str) -> str:
    """A share in percent: bold where it is false, in italics where intervals are too wide."""
    if what not in entry:
        return "–"
    rate, _, _, models = entry[what]
    text = f"{100 * rate:.0f}"
    if what == "coverage" and _is_above(rate, models, MOST_COVERED):
        return f"*{text}*"
    return f"**{text}**" if is_false(entry, what) else text


def is_false(entry: dict[str, Any], what: str) -> bool:
    """Whether a share is worse than wanted by more than the simulation's error: one of 1,000 right ones would be.

    Args:
        entry: Of a statistic.
        what: ``coverage``, ``outside`` (of the band of chance), ``size`` (found where there is nothing), or ``power``.
    """
    if what not in ("coverage", "outside", "size") or what not in entry:
        return False
    rate, _, _, models = entry[what]
    if what == "coverage":
        return bool(binom.cdf(round(rate * models), models, LEAST_COVERED) < _RARE)
    return _is_above(rate, models, SIZE)


def _is_above(rate: float, models: int, most: float) -> bool:
    return bool(binom.sf(round(rate * models) - 1, models, most) < _RARE)


def faults(cases: dict[str, Any]) -> list[str]:
    """What is false beyond the error of the simulation, one line each."""
    return [
        f"{name}: {statistic} {words} in {entry[what][0]:.1%} ({entry[what][1]:.1%} to {entry[what][2]:.1%})"
        for name, case in cases.items()
        for statistic, entry in case["statistics"].items()
        for what, words in _WORDS.items()
        if is_false(entry, what)
    ]
