"""Every row of ``layers.csv`` that ``inspect`` writes, recomputed from transformers' own hidden states.

Whether each formula is called on the right tokens, layers, labels, pictures and in the right direction: formulas have
tests of their own. The oracle reads each row alone and unpadded, and measures in NumPy, SciPy and scikit-learn.

Tolerances. States are float32 sums in another order (batches, padding, sdpa against eager): 1e-6 of their size;
measures in float32 add as much: 2e-4 relative is a margin of ten where a measure divides by small differences. Shares
of neighbors and ranks are counts: equal but for a tie that rounding breaks. Scores of probes: C is selected with
another optimizer at a looser tolerance, and one prediction in eighty, one pair in fifty, may fall on the other side.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lightning_mm as mm
from lightning_mm.analysis import probing
from lightning_mm.analysis.findings import FindingsWriter
from lightning_mm.analysis.geometry import ALL_MEASURES
from lightning_mm.analysis.probing import ProbingOptions
from lightning_mm.core.layer_table import read_layers
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.probes.probe import probe
from lightning_mm.testing.tiny import build_tiny
from lightning_mm.verbs.inspect import InspectionResult
from tests.helpers import plain_measures, plain_probes
from tests.helpers.plain_probe_set import (
    PlainVectors,
    overlap_of_cropped,
    overlap_of_resized,
    two_pictures,
    write_scenes,
)
from tests.helpers.plain_states import PlainModel, opened

FAMILIES = {"llava": overlap_of_cropped, "qwen2_vl": overlap_of_resized}
"""Two layouts: one square of tokens per picture, and as many tokens as the picture has cells."""
K = 4
SINGLE_SITES = {"picture": "picture/last", "text": "text/last", "image": "picture/image"}
PAIR_SITES = {
    "last": ("picture/last", "text/last"),
    "image~text": ("picture/image", "text/text"),
    "token": ("picture/token", "text/token"),
    "token_last": ("picture_last/token", "text_last/token"),
}
PICTURED = (("objects", "last"), ("objects", "image"), ("position", "last"), ("count", "last"))
"""Probes of pictures, and where they read."""
NEIGHBORS = ("overlap", "imbalance_text_to_image", "id_correlation")
"""Measures of the neighbors of the captions."""
CLOSE: dict[str, float] = {"rel": 2e-4, "abs": 2e-5}


class Seen:
    """What ``inspect`` found in one family, and the oracle's vectors."""

    def __init__(self, family: str, folder: Path) -> None:
        model = build_tiny(family, folder / "model", layers=3)
        scenes = write_scenes(folder)
        self.probe_set = two_pictures(scenes)
        self.probed: list[dict[str, Any]] = []
        undo = pytest.MonkeyPatch()
        undo.setattr(probing, "probe", self.keep_and_probe)
        self.found: InspectionResult = mm.inspect(
            model,
            probes=self.probe_set,
            measures="all",
            neighbours=K,
            probing=ProbingOptions(selectivity=True),
            select=False,
            batch_size=5,
        )
        undo.undo()
        self.plain = PlainVectors(PlainModel(model), scenes, self.probe_set.rows, FAMILIES[family])

    def keep_and_probe(self, x_LND: Any, labels: Any, groups_N: Any, **options: Any) -> Any:
        """``probe``, and what it was given."""
        given = {"x": x_LND, "labels": labels, "groups": groups_N, "types": options["types_N"]}
        self.probed.append({name: value.cpu().numpy() for name, value in given.items()})
        return probe(x_LND, labels, groups_N, **options)

    def check(self, measure: str, site: str, expected: Callable[[int], float | None], **close: float) -> None:
        """Compare a profile with the oracle's value of each slice; slice 0 is layer -1."""
        profile = self.found.profile(measure, site)
        assert sorted(profile) == [-1, 0, 1, 2], f"{measure} at {site}"
        told = {layer: row.value for layer, row in profile.items()}
        for layer in profile:
            value = expected(layer + 1)
            wanted = None if value is None else pytest.approx(value, **(close or CLOSE))
            assert told[layer] == wanted, f"{measure} at {site}, layer {layer}: {told}"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seen]:
    return cache(lambda family: Seen(family, tmp_path_factory.mktemp(family)))


def is_repeated(x: Any) -> bool:
    """Whether samples coincide exactly, as embeddings of words do: which is nearest is then open."""
    return len(np.unique(x, axis=0)) < len(x)


def is_constant(*sides: Any) -> bool:
    """Whether all samples coincide, as the embeddings of the last token do."""
    return any(bool(np.ptp(x, axis=0).max() <= 1e-6 * np.abs(x).max()) for x in sides)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("measure", sorted(plain_measures.SINGLE))
def test_measures_of_one_position(measure: str, family: str, seen: Callable[[str], Seen]) -> None:
    one = seen(family)
    for site, position in SINGLE_SITES.items():
        role, _, token = position.partition("/")
        x_TND = one.plain.stacked(one.plain.of_role(role), token)
        formula = plain_measures.SINGLE[measure]
        one.check(measure, site, lambda t, x=x_TND, f=formula: None if is_constant(x[t]) else f(x[t]))  # type: ignore[misc]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("measure", sorted(plain_measures.BLOCK))
def test_measures_of_a_block(measure: str, family: str, seen: Callable[[str], Seen]) -> None:
    one = seen(family)
    for site, position in SINGLE_SITES.items():
        role, _, token = position.partition("/")
        x_TND = one.plain.stacked(one.plain.of_role(role), token)
        formula = plain_measures.BLOCK[measure]
        one.check(measure, site, lambda t, x=x_TND, f=formula: f(x[t - 1], x[t]) if t else None)  # type: ignore[misc]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("measure", sorted(plain_measures.PAIR))
def test_measures_of_a_picture_and_its_caption(measure: str, family: str, seen: Callable[[str], Seen]) -> None:
    one = seen(family)
    formula = plain_measures.PAIR[measure]
    for site, positions in PAIR_SITES.items():
        a, b, groups = one.plain.pairs(*positions)

        def value(t: int, a: Any = a, b: Any = b, groups: Any = groups) -> float | None:
            tied = measure in NEIGHBORS and is_repeated(b[t])
            return None if tied or is_constant(a[t], b[t]) else formula(a[t], b[t], groups, K)

        one.check(measure, site, value)


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbors_that_show_the_same_thing(family: str, seen: Callable[[str], Seen]) -> None:
    one = seen(family)
    for site, position in SINGLE_SITES.items():
        if site == "text":  # rows of captions have no labels
            assert not one.found.profile("label_overlap", site)
            continue
        told = [
            (row, {o["name"] for o in one.plain.told[row.subject]["objects"]}) for row in one.plain.of_role("picture")
        ]
        single = [(row, names) for row, names in told if len(names) == 1]
        labels = np.array([sorted(*[names])[0] for _, names in single])
        x_TND = one.plain.stacked([row for row, _ in single], position.partition("/")[2])
        k = min(K, len(single) // 10)
        one.check(
            "label_overlap",
            site,
            lambda t, x=x_TND, y=labels, k=k: None if is_constant(x[t]) else plain_measures.label_overlap(x[t], y, k),  # type: ignore[misc]
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_with_every_other(family: str, seen: Callable[[str], Seen]) -> None:
    one = seen(family)
    found = {(m.measure, m.site): m.values.numpy() for m in one.found.findings[0].matrices}
    formulas = {"cka": plain_measures.cka, "overlap": lambda a, b: plain_measures.overlap(a, b, K)}
    sides = {site: one.plain.pairs(*positions)[:2] for site, positions in PAIR_SITES.items()}
    for site, position in SINGLE_SITES.items():
        role, _, token = position.partition("/")
        sides[site] = (one.plain.stacked(one.plain.of_role(role), token),) * 2
    assert set(found) == {(measure, site) for measure in formulas for site in sides}
    for (measure, site), matrix in found.items():
        a, b = sides[site]
        open_ends = is_repeated if measure == "overlap" else is_constant
        expected = [[np.nan if is_constant(x, y) or open_ends(y) else formulas[measure](x, y) for y in b] for x in a]
        np.testing.assert_allclose(matrix, expected, rtol=2e-4, atol=2e-6, err_msg=f"{measure} at {site}")


def test_every_measure_has_an_oracle() -> None:
    known = {*plain_measures.SINGLE, *plain_measures.BLOCK, *plain_measures.PAIR, "label_overlap"}
    assert {*ALL_MEASURES} == known | {"cka_matrix", "overlap_matrix"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_probe_is_given(family: str, seen: Callable[[str], Seen]) -> None:
    """Vectors, labels, groups and types of the control labels, row by row: scores near chance would not tell."""
    one = seen(family)
    expected: list[tuple[Any, Any, Any, Any]] = []
    for kind in ("random", "hard"):
        rows, truth = one.plain.entailment(kind)
        types = numbered([(one.plain.told[row.subject]["caption"], row.span) for row in rows])
        for blank in (False, True):
            expected.append((one.plain.stacked(rows, "last", blank), truth, one.plain.groups(rows), types))
    for name, site in (
        ("objects", "last"),
        ("objects", "image"),
        (None, None),
        ("position", "last"),
        ("count", "last"),
    ):
        if name is None or site is None:
            placed = list(one.plain.objects())
            num_objects = len(placed)
            names = [thing["name"] for _, thing, _ in placed]
            vectors = np.stack([vector for _, _, vector in placed], 1)
            labels = np.array([sorted(set(names)).index(each) for each in names])
            expected.append((vectors, labels, one.plain.groups([row for row, _, _ in placed]), numbered(names)))
            continue
        labelled = [(row, label_of(name, one.plain, row)) for row in one.plain.of_role("picture")]
        rows = [row for row, label in labelled if label is not None]
        told = np.array([label for _, label in labelled if label is not None])
        expected.append((one.plain.stacked(rows, site), told, one.plain.groups(rows), list(range(len(rows)))))
    assert len(one.probed) == len(expected)
    for given, (x_TND, labels, groups, types) in zip(one.probed, expected, strict=True):
        np.testing.assert_array_equal(given["labels"], labels)
        np.testing.assert_array_equal(given["groups"], groups)
        np.testing.assert_array_equal(given["types"], types)
        # Which part of a picture its patches show is measured off a ramp of colors, to a tenth of a pixel.
        atol = 3e-4 if x_TND.shape[1] == num_objects else 2e-5
        np.testing.assert_allclose(given["x"], x_TND, atol=atol, rtol=1e-3)


def numbered(types: list[Any]) -> list[int]:
    """Numbers of the types in the order of their first sample."""
    return [list(dict.fromkeys(types)).index(each) for each in types]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["random", "hard"])
def test_probes_of_the_caption(kind: str, family: str, seen: Callable[[str], Seen]) -> None:
    one = seen(family)
    rows, truth = one.plain.entailment(kind)
    assert len(rows) == 2 * truth.sum() >= 60
    groups = one.plain.groups(rows)
    types = numbered([(one.plain.told[row.subject]["caption"], row.span) for row in rows])
    control = plain_probes.control_labels(truth, types)
    for blank in (False, True):
        x_TND = one.plain.stacked(rows, "last", blank)
        scores = [None if is_constant(x) else plain_probes.accuracy(x, truth, groups) for x in x_TND]
        name = f"entailment/{kind}" + ("/text_only" if blank else "")
        # Without pictures, rows of one caption are alike: three of 80 may fall on the other side of the edge.
        one.check(name, "last", lambda t, s=scores: s[t], abs=0.038 if blank else 0.016)  # type: ignore[misc]
        if not blank:
            check_selectivity(one, name, "last", x_TND, scores, control, groups)


def check_selectivity(
    one: Seen, name: str, site: str, x_TND: Any, scores: list[float | None], control: Any, groups: Any
) -> None:
    """The score minus that of the same probe on control labels."""
    less = [
        None if s is None else s - plain_probes.score(x, control, groups) for x, s in zip(x_TND, scores, strict=True)
    ]
    one.check(f"{name}/selectivity", site, lambda t: less[t], abs=0.021)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("probe", "site"), PICTURED)
def test_probes_of_the_picture(probe: str, site: str, family: str, seen: Callable[[str], Seen]) -> None:
    one = seen(family)
    labelled = [(row, label_of(probe, one.plain, row)) for row in one.plain.of_role("picture")]
    labelled = [(row, label) for row, label in labelled if label is not None]
    rows, labels = [row for row, _ in labelled], np.array([label for _, label in labelled])
    x_TND, groups = one.plain.stacked(rows, site), one.plain.groups(rows)
    scores = [None if is_constant(x) else plain_probes.score(x, labels, groups) for x in x_TND]
    one.check(probe, site, lambda t: scores[t], abs=0.021)
    control = plain_probes.control_labels(labels, range(len(rows)))
    check_selectivity(one, probe, site, x_TND, scores, control, groups)


def label_of(probe: str, plain: PlainVectors, row: Any) -> Any:
    """What the file tells of a picture: which colours, how many squares, on which side the only one is."""
    things = plain.told[row.subject]["objects"]
    if probe == "objects":
        return [int(color in {each["name"] for each in things}) for color in sorted(("blue", "green", "red"))]
    if probe == "count":
        return len(things) - 1
    width = opened(row.sample.images[0]).size[0]
    left, _, right, _ = things[0]["box"]
    off = (left + right) / 2 / width - 0.5
    return int(off > 0) if len(things) == 1 and abs(off) >= 0.1 else None


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_of_each_object_at_its_patches(family: str, seen: Callable[[str], Seen]) -> None:
    one = seen(family)
    placed = list(one.plain.objects())
    groups = one.plain.groups([row for row, _, _ in placed])
    names = [thing["name"] for _, thing, _ in placed]
    labels = np.array([sorted(set(names)).index(name) for name in names])
    x_TND = np.stack([vector for _, _, vector in placed], 1)
    scores: list[float | None] = [plain_probes.accuracy(x, labels, groups) for x in x_TND]
    one.check("object_at_patches", "object", lambda t: scores[t], abs=0.021)
    control = plain_probes.control_labels(labels, numbered(names))
    check_selectivity(one, "object_at_patches", "object", x_TND, scores, control, groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_minus_its_parts(family: str, seen: Callable[[str], Seen]) -> None:
    """Accuracy of random false captions, of which half are true, minus AUROC of objects; chance is 0, the best 1."""
    one = seen(family)
    whole, parts = (one.found.profile(name, "last") for name in ("entailment/random", "objects"))

    def expected(t: int) -> float | None:
        one, other = whole[t - 1].value, parts[t - 1].value
        return None if one is None or other is None else 2 * (one - 0.5) - 2 * (other - 0.5)

    one.check("global_minus_local", "last", expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_of_a_kind_that_is_recomputed(family: str, seen: Callable[[str], Seen], tmp_path: Path) -> None:
    one = seen(family)
    captions = [
        f"entailment/{kind}{more}" for kind in ("random", "hard") for more in ("", "/text_only", "/selectivity")
    ]
    probes = {(name, "last") for name in (*captions, "global_minus_local")}
    for name, site in (*PICTURED, ("object_at_patches", "object")):
        probes |= {(name, site), (f"{name}/selectivity", site)}
    single = {(name, site) for name in (*plain_measures.SINGLE, *plain_measures.BLOCK) for site in SINGLE_SITES}
    pairs = {(name, site) for name in plain_measures.PAIR for site in PAIR_SITES}
    known = probes | single | pairs | {("label_overlap", "picture"), ("label_overlap", "image")}
    assert {(row.measure, row.site) for row in one.found.rows} == known
    assert not one.found.findings[0].problems
    run = RunDirectory(tmp_path)
    FindingsWriter(run).write(one.found.findings[0], 0.0, 0.0)
    written, bad = read_layers(run.layers)
    assert not bad
    assert [(r.measure, r.site, r.layer, r.value) for r in written] == [
        (r.measure, r.site, r.layer, pytest.approx(r.value)) for r in one.found.rows
    ]
