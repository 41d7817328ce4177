"""Items of Palacios et al. 2026, arXiv:2606.03871: geometry before and after tuning, modality gap, transplants.

Data flow: folders of ``inspect BASE --against TUNED`` and ``trace BASE --against TUNED`` -> items.
"""

from pathlib import Path

from paper_pages import charts
from paper_pages.items import Item, Profile, Readings, clear_of_null, peak_words, told

TITLE = "Palacios et al. 2026 (arXiv:2606.03871): where picture and word meet, before and after tuning"
LEAD = (
    "Methods of the authors' public code base and thesis, the nearest that could be read: of the paper itself only the "
    "abstract, and Table 1 as the author quotes it. Items are named after what they show.",
    "Protocol: last prompt token of decoder blocks, Euclidean neighbors, k = 30 of N = 2500, GRIDE at 16 and 32, "
    "biased linear CKA, SVCCA 0.95, distance correlation of unit rows, dataset entropy, tokens of what is read last, "
    "transplants with w = 1 and s = 2. k is at most a tenth of N: what was used stands with each number.",
)
_BASE, _TUNED = "before tuning", "after tuning"
_CAPTIONS = "pictures with captions of the probe file, and one fixed question; the code base asks COCO-QA's questions"


def items(folder: Path) -> list[Item]:
    """All items of the page.

    Args:
        folder: runs/papers/p3, with what ``inspect`` wrote in ``inspect`` and ``trace`` in ``transplant``.
    """
    read, moved = Readings(folder / "inspect"), Readings(folder / "transplant")
    return [
        _partial(),
        _drift(read),
        _meeting(read),
        _matrix(read),
        _alike(read),
        _dimension(read),
        _entropy(read),
        _gap(read),
        _transplant(moved, "cumulative", "layers 0 to l of the tuned model"),
        _transplant(moved, "sliding", "one layer of the tuned model at a time, every second one"),
    ]


def _both(read: Readings, measure: str, site: str, words: str = "") -> list[Profile]:
    label = f"{words}, " if words else ""
    return [read.profile(measure, site, f"{label}{when}", step) for step, when in enumerate((_BASE, _TUNED))]


def _partial() -> Item:
    return Item(
        "Table 1: tuning intermediate layers only",
        "LLaVA-7B, layers 6-16: 98.8 % of full tuning at 86.1 % of the training time; OneVision-4B, layers 8-25: "
        "100.4 % at 75.7 % (author's site)",
        [
            "The counterpart is a study of arms at equal steps and equal time, with early, late, uniform and random "
            "rivals: lightning-mm study. This page measures the two models it is given."
        ],
    )


def _drift(read: Readings) -> Item:
    overlap = [
        read.profile("drift_overlap", site, f"neighbors kept, {words}", 1)
        for site, words in (("picture", "pictures"), ("text", "captions"))
    ]
    cka = [
        read.profile("drift_cka", site, f"CKA, {words}", 1)
        for site, words in (("picture", "pictures"), ("text", "captions"))
    ]
    words = [
        f"{p.label}: {told(p.lowest)} in every layer, unchanged."
        if p.lowest.value == p.peak.value
        else f"{p.label}: lowest at layer {p.lowest.layer}, {told(p.lowest)}."
        for p in (*overlap, *cka)
        if p
    ]
    return Item(
        "Figure: similarity of the model before and after tuning",
        "for pictures it is lowest at about layer 7 of 32 (thesis)",
        words or ["Not measured."],
        [charts.lines(overlap, "share of neighbors"), charts.lines(cka, "CKA, debiased")] if words else [],
        files=[read.file],
        deviations=(
            _CAPTIONS,
            "CKA with the same layer is debiased; the biased form is measured between modalities",
        ),
    )


def _meeting(read: Readings) -> Item:
    last = _both(read, "overlap", "last", "last token")
    mean = _both(read, "overlap", "image~text", "mean of tokens")
    words = [peak_words(profile) for profile in (*last, *mean)]
    used = sorted({row.k for profile in (*last, *mean) for row in profile.rows.values() if row.k})
    deeper = [
        f"{p.label}: the peak is at {p.depth(p.peak):.0%} of the depth."
        for p in last
        if p and clear_of_null(p.peak, len(p.rows))
    ]
    return Item(
        "Figure: neighborhood overlap of pictures and captions",
        "alignment is strongest at 0.3 to 0.5 of the depth (second-hand); tuning extends and strengthens it (abstract)",
        [*words, *deeper, f"k used: {', '.join(map(str, used))}."],
        [charts.lines(last, "overlap, last token"), charts.lines(mean, "overlap, picture and caption tokens")],
        files=[read.file],
        deviations=(_CAPTIONS,),
    )


def _matrix(read: Readings) -> Item:
    found = [(when, read.matrix("overlap", "last", step)) for step, when in enumerate((_BASE, _TUNED))]
    words, pictures = [], []
    for when, each in found:
        if each is None:
            continue
        cells = [
            (value, one, other)
            for one, line in zip(each["layers"], each["values"], strict=True)
            for other, value in zip(each["layers"], line, strict=True)
            if value is not None and value == value
        ]
        if not cells:
            words.append(f"{when}: undefined in all layers.")
            continue
        value, one, other = max(cells)
        words.append(
            f"{when}: highest where pictures are read at layer {one} and captions at layer {other}, {value:.3g}."
        )
        pictures.append(charts.matrix(each, f"pictures, {when}", f"captions, {when}"))
    return Item(
        "Figure: neighborhood overlap of every layer with every layer",
        "compared over all pairs of layers (code base)",
        words or ["Not measured."],
        pictures,
        files=[read.run / "matrices.json"],
        deviations=(_CAPTIONS, "no interval of a cell"),
    )


def _alike(read: Readings) -> Item:
    names = {
        "cka_biased": "CKA, biased",
        "svcca": "SVCCA",
        "distance_correlation": "distance correlation",
        "id_correlation": "correlation of intrinsic dimensions",
    }
    sets = {name: _both(read, name, "last", words) for name, words in names.items()}
    words = [peak_words(profile) for each in sets.values() for profile in each]
    return Item(
        "Figure: other measures of alignment",
        "biased linear CKA, SVCCA at 0.95, distance correlation on unit rows, I_dCor (code base)",
        [*words, "All are far above 0 by chance: the dashed lines."],
        [charts.lines(each, names[name]) for name, each in sets.items() if any(each)],
        files=[read.file],
        deviations=(
            _CAPTIONS,
            "SVCCA: directions of centered data by share of variance, at most a tenth of N (anatome: uncentered, by "
            "sums of singular values)",
            "I_dCor: dimensions by TwoNN on features of variance 1; chance by random pairings, as biased",
        ),
    )


def _dimension(read: Readings) -> Item:
    picture, text = _both(read, "id_gride", "picture", "pictures"), _both(read, "id_gride", "text", "captions")
    words = [
        f"{p.label}: highest at layer {p.peak.layer}, {told(p.peak, 'isotropic noise')}."
        for p in (*picture, *text)
        if p
    ]
    return Item(
        "Figure: intrinsic dimension",
        "after tuning it peaks near layer 4 (16 to 18), dips near 10, rises again in the middle and ends at 9 to 10; "
        "before, picture questions peak near 21 at layers 13 to 16 (thesis)",
        words or ["Not measured."],
        [
            charts.lines(picture, "GRIDE, dimensions", chance=False),
            charts.lines(text, "GRIDE, dimensions", chance=False),
        ],
        files=[read.file],
        deviations=(_CAPTIONS, "neighbors 16 and 32 from 256 pictures on, nearer ones below"),
    )


def _entropy(read: Readings) -> Item:
    picture = _both(read, "entropy_unit_rows", "picture", "pictures")
    text = _both(read, "entropy_unit_rows", "text", "captions")
    words = [
        f"{p.label}: highest at layer {p.peak.layer}, {told(p.peak, 'isotropic noise')}."
        for p in (*picture, *text)
        if p
    ]
    return Item(
        "Figure: dataset entropy",
        "rows centered and of length 1, entropy of eigenvalues over ln min(N, D) (thesis)",
        words or ["Not measured."],
        [charts.lines([*picture, *text], "share of the most", chance=False)] if words else [],
        files=[read.file],
        deviations=(_CAPTIONS, "negative entries of the Gram matrix are kept; the code base sets them to 0"),
    )


def _gap(read: Readings) -> Item:
    cosine, auc = _both(read, "token_cosine", "token_last"), _both(read, "gap_auc", "token_last")
    words = [f"{p.label}: median cosine highest at layer {p.peak.layer}, {told(p.peak)}." for p in cosine if p]
    words += [
        f"{p.label}: a line parts the modalities least at layer {p.lowest.layer}, {told(p.lowest)}." for p in auc if p
    ]
    lost = "Not measured: the chat template moves the picture, or nothing was read in both orders."
    return Item(
        "Figure: modality gap",
        "tokens of both modalities form pure clusters until layers 10 to 12, then mix (thesis)",
        words or [lost],
        [charts.lines(cosine, "median cosine of two random tokens"), charts.lines(auc, "area under ROC")]
        if words
        else [],
        files=[read.file],
        deviations=(
            "one random token per sample of what is read last, caption and picture in one prompt; the code base has a "
            "question in place of the caption",
            "homogeneity of density-peak clusters is replaced by how well a line parts the modalities",
        ),
    )


def _transplant(read: Readings, mode: str, what: str) -> Item:
    sites = [("picture", "questions with a picture"), ("text", "questions in text")]
    profiles = [read.profile("transplant", f"{mode}/{site}", words) for site, words in sites]
    words = []
    for profile in (each for each in profiles if each):
        start = profile.peak.null or 0.0
        if all(row.value == start for row in profile.rows.values()):
            words.append(f"{profile.label}: {start:.3g} with any of them, as without.")
            continue
        words.append(
            f"{profile.label}: from {start:.3g} to {told(profile.peak, 'untouched')} at layer {profile.peak.layer}."
        )
        end = profile.top.value or 0.0
        if mode == "cumulative" and end > start:
            reached = [
                layer for layer, row in sorted(profile.rows.items()) if (row.value or 0) >= start + 0.85 * (end - start)
            ]
            words.append(f"85 % of the gain is there from layer {reached[0]} on." if reached else "")
        elif mode == "cumulative":
            words.append("The tuned layers all together do not raise it.")
    published = {
        "cumulative": "85 to 98 % of the tuned model's visual accuracy at layers 4 to 12, all from 12 on; text after "
        "14 (thesis)",
        "sliding": "no single layer suffices (thesis)",
    }[mode]
    return Item(
        f"Figure: {mode} transplants",
        published,
        [f"{what[0].upper()}{what[1:]}.", *words] if words else ["Not measured."],
        [charts.lines(profiles, "answered right")] if words else [],
        files=[read.file],
        deviations=(
            "an answer is right if each of its tokens is the most likely one given those before it; not exact match of "
            "generated text, CIDEr or CLIPScore",
            "layers only, not the projection of single heads",
            "a window that holds the last block brings final norm and head",
        ),
    )
