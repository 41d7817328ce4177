"""Writes study.md and study.html of a study from its small files, complete or not yet.

Data flow: folder -> ``StudyResults`` -> ``compare_arms`` -> sentences, tables, charts -> study.md, study.html.
"""

from collections.abc import Sequence
from pathlib import Path

from lightning_mm.core.io import write_atomically
from lightning_mm.report.study_page import StudyPage, StudyTable, write_study_page
from lightning_mm.study.charts import curves_over_layers, difference_charts, trade_charts
from lightning_mm.study.comparison import StudyComparison, compare_arms
from lightning_mm.study.layer_curves import agreements
from lightning_mm.study.results import StudyResults
from lightning_mm.study.sentences import Section, covers, tell
from lightning_mm.study.settings import START
from lightning_mm.study.statistics import Level


def write_study_report(path: str | Path) -> Path:
    """Write study.md and study.html; returns the page.

    Args:
        path: The study's folder; work/ is not needed.

    Raises:
        UserError: It is no study, or nothing of it is complete.
    """
    results = StudyResults.read(path)
    found = compare_arms(results)
    sections = tell(results, found)
    facts = _facts(results, found)
    tables = _tables(results, found)
    write_atomically(results.folder.path / "study.md", _markdown(results, found, sections, facts, tables))
    page = StudyPage(
        name=results.folder.path.name,
        outcome=_outcome(sections),
        sections=[(each.title, each.sentences) for each in sections],
        covers=covers(found),
        facts=facts,
        differences=difference_charts(results, found),
        trades=trade_charts(results, found),
        tables=tables,
        layers=curves_over_layers(results, found),
    )
    return write_study_page(results.folder.path / "study.html", page)


def _outcome(sections: Sequence[Section]) -> str:
    first = sections[0] if sections else None
    return f"{first.title} {first.sentences[0]}" if first else "Nothing can be compared yet."


def _facts(results: StudyResults, found: StudyComparison) -> list[str]:
    stage1 = results.settings.stage1
    begun = "" if stage1 is None else f" after a first stage of {stage1.steps} steps"
    machine = results.result(found.arms[0], found.seeds[0])["machine"]
    told = [
        f"Compared: {', '.join(found.arms)}; seeds {', '.join(map(str, found.seeds))}; "
        f"{results.settings.stage2.steps} steps each{begun}.",
        f"Measured on {machine['gpu'] or machine['processor']}, {machine['threads']} threads, {machine['torch']}.",
        "An answer is right if each of its tokens is the likeliest given those before: what greedy decoding writes.",
    ]
    if found.incomplete:
        told.append(f"Left out, because not every seed or arm is complete: {', '.join(found.incomplete)}.")
    return told


def _tables(results: StudyResults, found: StudyComparison) -> list[StudyTable]:
    tables = []
    for name, test in found.tests.items():
        tables.append(
            StudyTable(
                f"{name}: answered exactly, %",
                ("type", "n", "most frequent", "another picture", "gray", *found.arms),
                [
                    (
                        row.kind,
                        str(row.num),
                        f"{100 * row.majority:.1f}",
                        _share(row.other.get(_blind(results, found))),
                        _share(row.gray.get(_blind(results, found))),
                        *(_level(row.arms[arm]) for arm in found.arms),
                    )
                    for row in test.rows
                ],
                f"Another picture and gray: of {_blind(results, found)}, on the questions that were asked so.",
            )
        )
        chosen = [row for row in test.rows if row.choice]
        if chosen:
            tables.append(
                StudyTable(
                    f"{name}: the likeliest of its type's answers, %",
                    ("type", *found.arms),
                    [
                        (
                            row.kind,
                            *(f"{100 * row.choice[arm]:.1f}" if arm in row.choice else "–" for arm in found.arms),
                        )
                        for row in chosen
                    ],
                    "By the first token; a right choice in another form counts. Types with many answers are not asked.",
                )
            )
    tables += [_cost_table(found), *_causal_tables(results, found)]
    return tables


def _blind(results: StudyResults, found: StudyComparison) -> str:
    main = results.settings.roles.main
    return main if main in found.arms else found.arms[0]


def _cost_table(found: StudyComparison) -> StudyTable:
    most = max((cost["flops"] or 0.0 for cost in found.costs.values()), default=0.0)
    rows = []
    for arm, cost in found.costs.items():
        rows.append(
            (
                arm,
                "; ".join(cost["layers"]) or "–",
                f"{cost['weights'] / 1e6:.1f} M" if cost["weights"] else "–",
                f"{cost['flops'] / 1e9:.1f}" if cost["flops"] else "–",
                f"{100 * cost['flops'] / most:.0f}" if cost["flops"] and most else "–",
                f"{cost['seconds']:.3g}" if cost["seconds"] else "–",
                str(cost["equal_step"] or "–"),
                f"{found.text[arm].value:.3f}" if arm in found.text else "–",
                f"{100 * found.facts[arm].value:.1f}" if arm in found.facts else "–",
            )
        )
    columns = ("arm", "layers", "trained", "GFLOP a step", "% of the most", "s a step", "equal-cost step")
    note = "Seconds: median of the steps, as the machine was; FLOPs are counted. Text: lower is better."
    return StudyTable("Cost and what is kept", (*columns, "text, nats", "facts, %"), rows, note)


def _causal_tables(results: StudyResults, found: StudyComparison) -> list[StudyTable]:
    tables = []
    for arm in (START, results.settings.roles.main):
        pairs = agreements(results, arm, found.seeds) if arm in found.arms else []
        if pairs:
            rows = [
                (each.causal, each.geometric, f"{each.correlation:+.2f}", f"{each.p_value:.3f}", str(each.num_layers))
                for each in pairs
            ]
            tables.append(
                StudyTable(
                    f"{arm}: causal curves against geometric ones",
                    ("causal", "geometric", "rank correlation", "adjusted p", "layers"),
                    rows,
                    "p: share of random curves as smooth that correlate as strongly, adjusted after Holm.",
                )
            )
    return tables


def _markdown(
    results: StudyResults,
    found: StudyComparison,
    sections: Sequence[Section],
    facts: Sequence[str],
    tables: Sequence[StudyTable],
) -> str:
    lines = [f"# {results.folder.path.name}", "", covers(found), ""]
    for section in sections:
        lines += [f"## {section.title}", "", f"**{section.sentences[0]}**", ""]
        lines += [line for sentence in section.sentences[1:] for line in (f"- {sentence}",)]
        lines += [""]
    lines += [*(f"- {fact}" for fact in facts), ""]
    for table in tables:
        lines += [f"## {table.title}", "", f"| {' | '.join(table.columns)} |", f"|{'---|' * len(table.columns)}"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table.rows]
        lines += ["", table.note, ""] if table.note else [""]
    return "\n".join(lines).rstrip() + "\n"


def _level(level: Level) -> str:
    return f"{100 * level.value:.1f} ({100 * level.low:.1f} to {100 * level.high:.1f})"


def _share(level: Level | None) -> str:
    return "–" if level is None else f"{100 * level.value:.1f}"
