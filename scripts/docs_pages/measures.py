"""The page of layer measures: formula, null, when there is no value, source and papers of each.

Data flow: ``core.measure_catalog`` + ``measure_facts`` + docs/references.md -> Markdown by question.
"""

import re
from pathlib import Path

from docs_pages.markdown import cell, table
from docs_pages.measure_facts import FACTS, Fact
from lightning_mm.core import measure_catalog
from lightning_mm.core.measure_catalog import Measure

_REFERENCES = Path(__file__).parents[2] / "docs" / "references.md"
_ROW = re.compile(r"^\| ([^|]+) \| ([^|]*) \| ([^|]+) \| ([^|]+) \|$", re.M)
_HEAD = """# Measures

Every number of `layers.csv` and of the report: one value per layer and site, with its 95 % interval, its null (what
chance gives, or no effect), N and k. A measure that the data cannot support is *undefined*, with the reason in the
row; it is undefined everywhere where a vector is not finite. Intervals are of a delete-group jackknife (geometry) or
a bootstrap over pictures (probes); samples of one picture count as dependent. Compare at equal N only: most measures
depend on it.

Layer −1 is the embeddings, layer *l* the output of decoder block *l*. N: samples, D: hidden size, k: neighbors, X and
Y: centered features of the two sides, K and L: their Gram matrices, λ: eigenvalues of the covariance, σ: singular
values.
"""
_TAIL = """
## Variants of probes

| variant | meaning | null |
|---|---|---|
| `MEASURE/text_only` | the same probe with the picture withheld: what language alone gives | as the probe |
| `MEASURE/selectivity` | accuracy − accuracy on random labels of the same kind (Hewitt and Liang 2019) | 0 |
| `MEASURE/compression` | code length of a uniform code / online code length (Voita and Titov 2020) | 1 |

## Sites

"""


def page() -> str:
    """Markdown: a table of all measures, then one section per measure."""
    papers = _papers()
    text = _HEAD
    for question, (title, meaning) in measure_catalog.QUESTIONS.items():
        members = [each for each in measure_catalog._KNOWN if each.question == question]
        if members:
            text += f"\n## {title}\n\n{meaning}\n\n" + "\n".join(_section(each, papers) for each in members)
    sites = {**measure_catalog.SITE_WORDS}
    rows = [(f"`{site}`", cell(words)) for site, words in sites.items() if site]
    return text + _TAIL + table(("site", "where"), rows)


def _section(each: Measure, papers: dict[str, list[str]]) -> str:
    fact: Fact = FACTS[each.name]
    low, high = ("−∞" if each.low is None else f"{each.low:g}"), ("∞" if each.high is None else f"{each.high:g}")
    better = {"min": "lower", "max": "higher", None: "neither"}[each.better]
    rows = [
        ("formula", cell(fact.formula)),
        ("range, unit", f"{low} to {high}" + (f", {each.unit}" if each.unit else "")),
        ("better", better),
        ("null", cell(fact.null)),
        ("undefined", cell(fact.undefined)),
        ("source", f"`lightning_mm.{fact.source}`" + _cited(fact, papers)),
    ]
    return f"### {each.name}\n\n{each.meaning[0].upper()}{each.meaning[1:]}.\n\n" + table(("aspect", each.title), rows)


def _cited(fact: Fact, papers: dict[str, list[str]]) -> str:
    module = "/".join(fact.source.split(".")[:-1]) + ".py"
    cited = papers.get(module, [])
    return "; " + "; ".join(cited) if cited else ""


def _papers() -> dict[str, list[str]]:
    """Module, relative to lightning_mm -> the papers that docs/references.md names for it."""
    found: dict[str, list[str]] = {}
    for paper, _, what, where in _ROW.findall(_REFERENCES.read_text(encoding="utf-8")):
        for module in re.findall(r"`([\w/]+\.py)`", where):
            found.setdefault(module, []).append(f"{paper} ({what.split(';')[0].strip()})")
    return found
