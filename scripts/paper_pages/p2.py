"""Items of Basu et al. 2024, arXiv:2406.04236: causal traces, attention contributions, failure, edits.

Data flow: folders of ``trace`` (windows 1 and 5) and ``edit`` (as released; with a wider clamp) -> items.
"""

import json
from pathlib import Path
from typing import Any

from paper_pages import charts
from paper_pages.items import Item, Profile, Readings, clear_of_null, told

TITLE = "Basu et al. 2024 (arXiv:2406.04236): where a model stores what a question asks for"
LEAD = (
    "Protocol of the released code (--convention p2): prompt '{question}? Answer in a few words.', the constraint's "
    "first place overwritten by the first token of Paris, module outputs of one token put back, the clean run's first "
    "token followed, mean effect over questions.",
    "Numbers of figures are given where they could be read (Figure 2 is the method); other items are named after what "
    "they show.",
)
_SHARED = (
    "questions that the model answers right; the released script follows the model's own first token whatever it is",
    "the chat template of this model, not '<image>\\nUSER: ... ASSISTANT:'",
    "units: tokens from the constraint on; earlier ones cannot differ",
)
WINDOWS = (1, 5)


def items(folder: Path) -> list[Item]:
    """All items of the page.

    Args:
        folder: runs/papers/p2, with trace-w1, trace-w5, edit-released and edit-clamp4.
    """
    reads = {width: Readings(folder / f"trace-w{width}") for width in WINDOWS}
    causal = json.loads((folder / "trace-w1" / "causal.json").read_text())
    made = [_corruption(reads[1], causal)]
    made += [_trace(width, read) for width, read in reads.items()]
    made += [_flow(reads[1]), _cuts(reads[1]), _failure(reads[1], causal), _edits(folder)]
    return made


def _corruption(read: Readings, causal: dict[str, Any]) -> Item:
    rows = [row for row in read.rows if row.measure == "trace_effect"]
    note = next((note for row in rows for note in row.notes if note.startswith("of all traced")), "nothing was traced")
    traced = rows[0].n if rows else 0
    asked = f"{causal['n_questions']} questions asked, {causal['n_right']} answered right, {traced} traced"
    return Item(
        "Figure 2 (method): clean, corrupted, restored",
        "replacing the constraint takes the answer's probability; clean activations copied back restore it",
        [f"{asked}; {note}."],
        files=[read.file],
        deviations=_SHARED,
    )


def _trace(width: int, read: Readings) -> Item:
    layers = "one layer" if width == 1 else f"layers l − {width} to l + {width}"
    profiles = {
        (site, where): read.profile("trace_effect", f"{site}/{where}", f"{site}, {words}")
        for site in ("mlp", "attention")
        for where, words in (("constraint", "constraint"), ("question", "rest of question"), ("last", "last token"))
    }
    words = [_strongest(profile) for profile in profiles.values() if profile]
    early = "seen already with one layer at a time; MLP and attention of layers 1 to 4 in LLaVA-7B (second-hand)"
    wide = "Vicuna-7B needs a window of 5 and layers 4 to 7; several constraints need 6 (second-hand)"
    pictures = [
        charts.lines([profile for (at, _), profile in profiles.items() if at == site], "gain of probability")
        for site in ("mlp", "attention")
        if any(profile for (at, _), profile in profiles.items() if at == site)
    ]
    for measure, name in (("trace_ratio", "ratio of means"), ("trace", "mean of ratios, noisier")):
        if ratio := read.profile(measure, "mlp/constraint"):
            most, notes = ratio.peak, "; ".join(ratio.peak.notes)
            said = told(most, "no effect")
            words.append(
                f"As a share of the fall ({name}), MLP at the constraint: {said}, {most.n} questions, "
                f"at layer {most.layer}{f' ({notes})' if notes else ''}."
            )
    return Item(
        f"Figure: causal trace, window {width} ({layers})",
        early if width == 1 else wide,
        words or ["Nothing could be traced."],
        pictures,
        files=[read.file, read.run / "traces.json"],
        deviations=(
            *_SHARED,
            "no run of the language model alone: the questions cannot be answered without their picture",
        ),
    )


def _strongest(profile: Profile) -> str:
    peak = profile.peak
    clear = "clear of it" if clear_of_null(peak, len(profile.rows)) else "not clear of it"
    where = f"layer {peak.layer} of {max(profile.rows) + 1}"
    return f"{profile.label}: largest at {where}, {told(peak, 'no effect')}; {clear}."


def _flow(read: Readings) -> Item:
    named = {
        "image_late->constraint": "late picture tokens to constraint",
        "image_early->constraint": "early picture tokens to constraint",
        "constraint->last": "constraint to last token",
        "image->last": "picture to last token",
    }
    profiles = [read.profile("flow", edge, words) for edge, words in named.items()]
    words = [
        f"{p.label}: largest share at layer {p.peak.layer}, {told(p.peak, 'equal contributions')}."
        for p in profiles
        if p
    ]
    return Item(
        "Figure: attention contributions",
        "late picture tokens (about 540 to 576 of 576) contribute to the constraint through the first attention layer; "
        "the constraint contributes to the last token most at layers 16 and 17 of LLaVA-7B (second-hand)",
        words or ["Not measured."],
        [charts.lines(profiles, "share of contributions")] if any(profiles) else [],
        files=[read.file],
        deviations=(
            "shares of all contributions, not norms; right answers only, wrong ones in the failure predictor",
            "late: the last sixteenth of the picture's tokens",
        ),
    )


def _cuts(read: Readings) -> Item:
    profiles = [
        read.profile("knockout", f"{edge}/pre", words)
        for edge, words in (("image->last", "picture from last token"), ("constraint->last", "constraint from last"))
    ]
    words = []
    for profile in (each for each in profiles if each):
        most = profile.lowest
        words.append(
            f"{profile.label}: costs most at layer {most.layer}, {told(most, 'no effect')} of the probability."
        )
    return Item(
        "Attention cut, layer by layer",
        "no figure of this paper: contributions checked by an intervention",
        words or ["Not measured."],
        [charts.lines(profiles, "change of probability")] if words else [],
        files=[read.file],
        deviations=("cut before the softmax in one layer at a time; the rest is renormalized",),
    )


def _failure(read: Readings, causal: dict[str, Any]) -> Item:
    found = [table for table in causal["tables"] if table["title"] == "Are wrong answers foreseen?"]
    published = "contributions foresee failure, and confidence has the higher AUROC (second-hand)"
    if not found:
        return Item("Figure: failure prediction", published, ["Not made: too few right or wrong answers."])
    table = found[0]
    rows = [["" if cell is None else str(cell) for cell in row] for row in table["rows"]]
    by = {(row[0], row[1]): row for row in rows}
    own, sure = by["AUROC", "attention to the constraint"], by["AUROC", "confidence"]
    words = f"AUROC of contributions {own[2]} ({own[3]} to {own[4]}), of confidence {sure[2]} ({sure[3]} to {sure[4]})."
    return Item(
        "Figure: failure prediction",
        published,
        [words if own[2] else f"Undefined: {own[7]}."],
        tables=[(table["columns"], rows)],
        files=[read.run / "causal.json"],
        deviations=("10 splits, both halves, by groups of questions; C by the number of questions, 0.05 from 500 on",),
    )


def _edits(folder: Path) -> Item:
    tables, words = [], []
    for name, what in (("edit-released", "as released, clamp 1e-4"), ("edit-clamp4", "the same with clamp 4")):
        told_edits = json.loads((folder / name / "edits.json").read_text())
        outcome = next(one for one in told_edits["outcomes"] if one["method"] == "MultEdit" and one["apply"] == "each")
        rows = [
            [key, _cell(value), str(value["n"])]
            for key, value in outcome["measures"].items()
            if value["value"] is not None
        ]
        tables.append(((f"{what} (layer {told_edits['layer']})", "value", "n"), rows))
        done = outcome["measures"]["efficacy"]
        words.append(f"MultEdit {what}: new answer given after {_cell(done)} of {done['n']} edits.")
    return Item(
        "Table: MultEdit",
        "edits of the early causal blocks correct errors and insert long-tailed facts (abstract)",
        words,
        tables=tables,
        files=[folder / name / "edits.json" for name in ("edit-released", "edit-clamp4")],
        deviations=(
            "answers count if greedy decoding writes all their tokens; the paper's accuracy is VQA's",
            "as released, the clamp is 1e-4 of the value's length: next to nothing moves, so a second run has 4",
        ),
    )


def _cell(estimate: dict[str, Any]) -> str:
    text = f"{estimate['value']:.3g}"
    return text if estimate["low"] is None else f"{text} ({estimate['low']:.3g} to {estimate['high']:.3g})"
