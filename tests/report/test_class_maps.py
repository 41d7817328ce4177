"""Maps over kinds of tokens: values, intervals and reasons where they belong; what is not clear is pale."""

import re
import xml.etree.ElementTree as ET

from lightning_mm.report.figures import colors
from lightning_mm.report.figures.class_maps import class_maps
from lightning_mm.report.tables.panels import TrainedLayers
from tests.helpers.causal_files import LAYERS, traced_rows


def cells(root):
    """{words: (left, top, class)} of each cell."""
    found = {}
    for path in root.iter("path"):
        if path.find("title") is not None and path.get("class").startswith(("d", "none")):
            left, top = map(float, re.match(r"M([-\d.]+) ([-\d.]+)", path.get("d")).groups())
            found[path.find("title").text] = (left, top, path.get("class"))
    return found


def test_cells_say_value_interval_and_n_and_stand_by_layer_and_kind():
    mlp, attention, residual = class_maps(traced_rows())
    assert [each.title for each in (mlp, attention, residual)] == [
        "MLP put back",
        "Attention put back",
        "Residual stream put back",
    ]
    assert mlp.classes == ("image_late", "constraint", "template", "last")
    found = cells(ET.fromstring(mlp.drawing(TrainedLayers((2, 3), LAYERS)).svg()))
    assert len(found) == 4 * LAYERS
    best = found["layer 3, constraint: 50\u00a0% (40\u00a0% to 60\u00a0%), no effect 0\u00a0%, N 40"]
    assert best[2] == f"d{2 * colors.ARM}"
    lefts, tops = sorted({left for left, *_ in found.values()}), sorted({top for _, top, _ in found.values()})
    assert (lefts.index(best[0]), tops[::-1].index(best[1])) == (1, 3)
    pale = [
        kind for words, (*_, kind) in found.items() if "to" in words and words.count("constraint") and "50" not in words
    ]
    assert all(kind.endswith(" pale") for kind in pale)
    assert found["layer 0, template: undefined (no such token <b>)"][2] == "none"


def test_parts_of_a_layer_share_their_colors_and_the_residual_stream_does_not_drown_them():
    mlp, attention, residual = class_maps(traced_rows())
    assert (mlp.reach, attention.reach, residual.reach) == (0.5, 0.5, 1.0)
    assert mlp.said == "most at layer 3, constraint"
    assert attention.said == "nothing that its interval tells from no effect"


def test_the_last_step_is_shown_and_nothing_makes_no_map():
    rows = traced_rows(0) + [row for row in traced_rows(9) if row.site.startswith("mlp")]
    (only,) = class_maps(rows)
    assert {row.step for row in only.rows.values()} == {9}
    assert class_maps([]) == []
