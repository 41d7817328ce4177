"""Maps over kinds of tokens: values, intervals and reasons where they belong; what is not clear is pale."""

from lightning_mm.report.figures import theme
from lightning_mm.report.figures.class_maps import class_maps
from lightning_mm.report.tables.panels import TrainedLayers
from tests.helpers.causal_files import LAYERS, traced_rows
from tests.helpers.page import boxes, cells, marks, texts


def test_cells_say_value_interval_and_n_and_stand_by_layer_and_kind():
    mlp, attention, residual = class_maps(traced_rows())
    assert [each.title for each in (mlp, attention, residual)] == [
        "MLP put back",
        "Attention put back",
        "Residual stream put back",
    ]
    assert mlp.classes == ("image_late", "constraint", "template", "last")
    svg = mlp.figure(TrainedLayers((2, 3), LAYERS)).svg()
    found = cells(svg, theme.SIGNED)
    assert len(found) == 3 * LAYERS
    best = found["layer 3, constraint: 50\u00a0% (40\u00a0% to 60\u00a0%), no effect 0\u00a0%, N 40"]
    assert best[2] == 2 * theme.ARM
    assert len(marks(svg, "trained_bar")) == 1
    assert texts(svg, "kinds") == ["picturelate", "constraint", "template", "lasttoken"]
    undefined = {path.find("title").text: boxes(path)[0][:2] for path in marks(svg, "undefined")}
    assert len(undefined) == len(marks(svg, "hatch")) == LAYERS
    places = [*((left, top) for left, top, _ in found.values()), *undefined.values()]
    lefts, tops = sorted({left for left, _ in places}), sorted({top for _, top in places})
    assert (lefts.index(best[0]), tops[::-1].index(best[1])) == (1, 3)
    opacity = {path.find("title").text: path.get("fill-opacity") for path in marks(svg, "cells")}
    pale = [kind for words, kind in opacity.items() if words.count("constraint") and "50" not in words]
    assert len(pale) == LAYERS - 1
    assert set(pale) == {str(theme.PALE)}
    assert opacity["layer 3, constraint: 50\u00a0% (40\u00a0% to 60\u00a0%), no effect 0\u00a0%, N 40"] in (None, "1")
    assert "layer 0, template: undefined (no such token <b>)" in undefined


def test_parts_of_a_layer_share_their_colors_and_the_residual_stream_does_not_drown_them():
    mlp, attention, residual = class_maps(traced_rows())
    assert (mlp.reach, attention.reach, residual.reach) == (0.5, 0.5, 1.0)
    assert mlp.summary == "most at layer 3, constraint"
    assert attention.summary == "nothing that its interval tells from no effect"


def test_the_last_step_is_shown_and_nothing_makes_no_map():
    rows = traced_rows(0) + [row for row in traced_rows(9) if row.site.startswith("mlp")]
    (only,) = class_maps(rows)
    assert {row.step for row in only.rows.values()} == {9}
    assert class_maps([]) == []
