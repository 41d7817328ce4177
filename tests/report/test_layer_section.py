"""What the report says of the layers: the right peak, change and place, each reason and each note once."""

from dataclasses import replace

import pytest

from lightning_mm.core.io import read_json
from lightning_mm.core.layer_table import LayerRow, read_layers
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report.figures import theme
from lightning_mm.report.sections import selection
from lightning_mm.report.sections.layers import layer_section
from lightning_mm.report.tables.panels import StepLabels, TrainedLayers
from tests.helpers.page import boxes, marks

TRAINED = TrainedLayers((2, 3), 6)
NAMES = StepLabels({})


def row(step, layer, value, measure="entailment/hard", site="last", **rest):
    why = "" if value is not None else "constant"
    return LayerRow(step, "probing", measure, site, layer, value, undefined=why, **rest)


def seen(rows, trained=TRAINED, names=NAMES, bad=0):
    return layer_section(rows, bad, trained, names)


def test_a_headline_says_peak_change_chance_and_place():
    sure = {"null": 0.5, "null_low": 0.45, "null_high": 0.55, "n": 1234}
    early = [row(0, i, v, low=v - 0.05, high=v + 0.05, **sure) for i, v in enumerate([0.5, 0.6, 0.55, 0.5, 0.5, 0.5])]
    sure |= {"notes": ("five parts", "the peak is at layer 2 to 4 in 95 % of resamples")}
    late = [row(9, i, v, low=v - 0.05, high=v + 0.05, **sure) for i, v in enumerate([0.5, 0.6, 0.7, 0.9, 0.5, 0.5])]
    told = seen([*early, *late])
    (line,) = told.headlines
    assert told.notes == (("five parts", "Entailment, hard"),)
    assert (line.title, line.place) == ("Entailment, hard", "last token")
    assert line.cells == {
        "peak": "layer 3",
        "sure": "between 2 and 4",
        "was": "was layer 1",
        "value": "90\u00a0%",
        "interval": "85\u00a0% to 95\u00a0%",
        "chance": "50\u00a0%",
        "n": "1,234",
        "change": "+40 points",
        "where": "inside",
    }
    assert line.clear
    assert line.moved
    assert line.trains


def test_clear_of_chance_is_told_over_all_layers_where_that_is_known() -> None:
    apart = {"low": 0.6, "high": 0.7, "null": 0.5, "null_low": 0.45, "null_high": 0.55}
    for p, clear in ((0.04, True), (0.06, False)):
        assert seen([row(0, 0, 0.65, p_adjusted=p, **apart), row(0, 1, 0.1)]).headlines[0].clear == clear


@pytest.mark.parametrize(
    ("low", "high", "null", "null_low", "null_high", "clear"),
    [
        (0.6, 0.7, 0.5, 0.4, 0.59, True),
        (0.6, 0.7, 0.5, 0.4, 0.6, False),
        (0.6, 0.7, 0.5, None, None, True),
        (0.4, 0.7, 0.5, None, None, False),
        (0.2, 0.3, 0.5, 0.4, 0.6, True),
        (None, None, 0.5, 0.4, 0.6, True),
        (0.6, 0.7, None, None, None, True),
    ],
)
def test_clear_of_chance_is_told_from_the_interval_and_the_band(low, high, null, null_low, null_high, clear):
    rows = [row(0, 0, 0.65, low=low, high=high, null=null, null_low=null_low, null_high=null_high), row(0, 1, 0.1)]
    assert seen(rows).headlines[0].clear == clear


def test_a_change_counts_only_where_the_intervals_tell_it_over_all_layers():
    """0.1 against sqrt(2) times the reach, and 1.89 times as much where the layer is one of 32."""
    for reach, layers, counts in [
        (0.07, 1, True),
        (0.072, 1, False),
        (0.036, 32, True),
        (0.04, 32, False),
        (None, 1, False),
    ]:
        ends = {} if reach is None else {"low": 0.0, "high": 0.0}
        rows = [
            row(s, i, v, **{k: v + (reach if k == "high" else -reach) for k in ends})
            for s, top in [(0, 0.5), (5, 0.6)]
            for i, v in enumerate([top, *[0.4] * (layers - 1)])
        ]
        (line,) = seen(rows).headlines
        assert line.moved == counts, (reach, layers)
        assert line.cells["change"] == "+10 points"


def test_places_are_seen_from_what_trains():
    places = [seen([row(0, layer, 0.9), row(0, 5, 0.1)]).headlines[0].cells["where"] for layer in (-1, 1, 2, 4)]
    assert places == ["3 below", "1 below", "inside", "1 above"]
    assert seen([row(0, 1, 0.9)], TrainedLayers()).headlines[0].cells["where"] == "–"


def test_what_moved_comes_first_and_nothing_moved_is_no_peak():
    rows = [row(0, i, 1.0, "drift_overlap", "picture") for i in range(6)]
    told = seen([*[row(0, i, 0.1 * i) for i in range(6)], *rows])
    assert [line.title for line in told.headlines] == ["Neighbours kept since the start", "Entailment, hard"]
    assert told.headlines[0].cells["peak"] == "all alike"
    assert "moved" not in told.lead


def test_the_lead_says_where_most_moved(looked):
    trained = TrainedLayers.of(read_json(looked.census))
    told = seen(read_layers(looked.layers)[0], trained)
    assert told.lead.startswith("Layers 7–14 of 30 train. Read at 6 steps, between step 0 and step 500. ")
    assert (
        "Most moved: layer 14, which trains; samples keep 45\u00a0% of their neighbours there (last token, picture)."
        in told.lead
    )


def test_the_whole_inspection_is_sorted_by_question(looked):
    told = seen(read_layers(looked.layers)[0], TrainedLayers.of(read_json(looked.census)))
    titles = [group.title for group in told.groups]
    assert titles == [
        "Do picture and text agree?",
        "Which objects?",
        "Where do picture and caption meet?",
        "Shape of the representations",
        "What moved since the start",
        "Other measures",
    ]
    shown = [(card.title, card.place) for group in told.groups for card in group.shown]
    assert len(shown) == len(told.headlines) == 10
    assert ("Modality gap", "last token") not in shown  # its AUC is
    everything = [card for group in told.groups for card in (*group.shown, *group.more)]
    assert len(everything) == len({(r.measure, r.site) for r in read_layers(looked.layers)[0]})
    assert "my_own_measure" in told.groups[-1].titles


def test_each_reason_and_note_stands_once(looked):
    told = seen(read_layers(looked.layers)[0], TrainedLayers.of(read_json(looked.census)))
    (gap,) = told.undefined
    assert (gap.reason, gap.layers) == ("constant: all 240 samples coincide", "embeddings")
    assert gap.places == "last token; last token, caption; last token, picture"
    assert [note for note, _ in told.notes] == ["3 duplicates were left out"]


def test_a_measure_without_any_value_is_a_reason_and_no_card():
    told = seen([row(0, i, None) for i in range(-1, 4)])
    assert told.headlines == told.groups == ()
    assert [(gap.reason, gap.layers) for gap in told.undefined] == [("constant", "embeddings and layers 0–3")]


def test_reasons_that_differ_in_their_numbers_are_one_with_the_range():
    rows = [
        replace(row(0, 0, None, site=f"s{n}"), undefined=f"constant: all {n} samples coincide") for n in (64, 9, 128)
    ]
    (gap,) = seen(rows).undefined
    assert gap.reason == "constant: all 9–128 samples coincide"


def test_nothing_at_all_is_an_empty_section():
    told = seen([], bad=3)
    assert told.headlines == told.groups == told.undefined == ()
    assert told.left_out == "3 lines of layers.csv cannot be read"


def test_more_panels_than_a_page_holds_are_counted():
    told = seen([row(0, 0, 0.5, f"m{i}") for i in range(400)])
    assert sum(len(group.more) for group in told.groups) == 160
    assert "240 further panels are not drawn" in told.left_out


def test_labels_stand_for_the_steps_of_a_comparison():
    names = StepLabels({0: "runs/a", 1: "runs/b"})
    told = seen([row(s, i, 0.5 + s * i / 20) for s in (0, 1) for i in range(6)], names=names)
    assert told.ends == ("runs/a", "runs/b")
    assert "Compared: runs/a and runs/b." in told.lead


def test_the_matrices_are_first_and_last_and_the_rest_on_demand(looked):
    shown, more = selection.matrices(read_json(looked.matrices), TrainedLayers.of(read_json(looked.census)), NAMES)
    assert [(card.title, card.place, card.pair) for card in shown] == [("CKA", "last token, picture", False)]
    assert [(card.place, card.pair) for card in more] == [("last token", True)]
    assert [words for words, _ in shown[0].drawings] == ["step 0", "step 500"]


@pytest.mark.parametrize(
    "item",
    [
        {"layers": [0, 1], "values": [[1.0]]},
        {"layers": [0, 1], "values": [[1.0, 0.5], [0.5]]},
        {"layers": [1, 0], "values": [[1, 0], [0, 1]]},
        {"layers": [], "values": []},
        {"layers": [5000], "values": [[1]]},
        {"layers": [-7], "values": [[1]]},
    ],
)
def test_a_matrix_that_does_not_fit_its_layers_is_refused(item):
    with pytest.raises(ValueError, match="layer"):
        selection.matrices([{"step": 0, "measure": "cka", "site": "last", **item}], TRAINED, NAMES)


def test_the_probe_set_and_what_looking_cost(looked):
    told = selection.probe_set(read_json(looked.probes))
    assert told["facts"]["Pictures"] == "240"
    assert {"task": "Entailment, hard", "rows": "480", "images": "240"} in told["tasks"]
    cost = selection.cost(read_json(looked.inspections))
    assert cost["words"] == "6 looks took 43.8 s (forward 19.2 s, analyses 24.6 s), 3.2\u00a0% of the training time."
    assert selection.cost([{"step": 0, "seconds": {}, "share": None, "problems": ["a", "a"]}])["problems"] == ["a"]


def members(track):
    """How many layers of a range are filled."""
    return sum(len(boxes(path)) for path in marks(track, "layers") if path.get("fill") in (theme.TEAL, theme.SOFT))


def test_the_choice_says_window_interval_peaks_and_rivals(chosen):
    told = selection.chosen(read_json(chosen.selection), TrainedLayers())
    assert (told.expression, told.evidence) == ("7-14", True)
    assert told.words == "95 % interval of its first layer 6 to 8, of its last 13 to 16."
    assert [(score.title, score.peak) for score in told.scores[:2]] == [
        ("all together", "highest at layer 11"),
        ("overlap", "highest at layer 13"),
    ]
    assert [(line.title, members(line.track)) for line in told.ranges] == [
        ("chosen", 8),
        ("EarlyLayers", 8),
        ("LateLayers", 8),
        ("UniformSparse", 8),
    ]


def test_a_fall_back_is_not_marked_as_chosen(chosen):
    raw = read_json(chosen.selection)
    assert selection.selected(raw).layers == tuple(range(7, 15))
    assert selection.selected(raw | {"evidence": False}) == TrainedLayers((), 30, "chosen")
    told = selection.chosen(raw | {"evidence": False}, TrainedLayers())
    assert (told.evidence, told.words, told.expression) == (False, "", "7-14")


def test_main_measures_stand_in_the_order_of_the_vocabulary_whatever_the_files():
    names = ["overlap", "gap_auc", "cka", "entailment/random", "overlap", "entailment/hard"]
    told = seen([row(0, i, i / 9, name, f"site{k}") for k, name in enumerate(names) for i in range(3)])
    titles = [line.title for line in told.headlines]
    assert titles[:4] == ["Entailment, hard", "Entailment, random", "Shared neighbours", "Shared neighbours"]
    assert titles[4:] == ["CKA", "Modality gap, AUC"]


def test_a_choice_with_little_in_it_is_still_told():
    told = selection.chosen({"layers": [1], "criteria": {"a": [None, None]}}, TrainedLayers())
    assert told.expression == "1"
    assert told.scores[0].peak == "undefined"


@pytest.mark.parametrize(
    "raw", [{"layers": []}, {"layers": [-1]}, {"layers": [10**7]}, {"layers": [0], "score": [0] * 2000}]
)
def test_a_choice_of_no_layers_is_refused(raw):
    with pytest.raises(ValueError, match="layers"):
        selection.chosen(raw, TrainedLayers())


@pytest.fixture
def chosen(tmp_path, choose):
    return choose(RunDirectory.create(tmp_path, "chosen"))
