"""Pages of the papers: sentences say what intervals carry, costs of full-size commands follow from counted FLOPs."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mm.core.layer_table import LayerRow, append_layers

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.append(str(SCRIPTS))

from paper_pages import items, seven_b  # noqa: E402  (scripts are no package of ours)
from paper_pages.p1 import items as p1_items  # noqa: E402


def row(
    layer: int, value: float, half: float = 0.05, null: float = 0.5, measure: str = "entailment/random"
) -> LayerRow:
    band = {"null": null, "null_low": null - 0.04, "null_high": null + 0.04}
    return LayerRow(0, "probing", measure, "last", layer, value, low=value - half, high=value + half, n=100, **band)


def test_a_peak_over_many_layers_needs_more_than_an_interval_clear_of_chance() -> None:
    best = row(3, 0.56)
    assert best.low > best.null  # type: ignore[operator]
    assert items.clear_of_null(best, 1)
    assert not items.clear_of_null(best, 30)
    assert items.clear_of_null(row(3, 0.75), 30)
    assert not items.clear_of_null(LayerRow(0, "p", "m", "s", 0, 0.9), 30), "without an interval nothing is clear"


def test_sentences_name_the_peak_and_whether_the_top_falls_from_it() -> None:
    profile = items.Profile(
        "entailment", {layer: row(layer, 0.55 + 0.02 * (10 - abs(layer - 10))) for layer in range(20)}
    )
    assert "highest at layer 10 of 20, 0.75" in items.peak_words(profile)
    assert items.peak_words(profile).endswith("clear of chance over 20 layers.")
    assert "it falls by 0.18, clear" in items.drop_words(profile)
    flat = items.Profile("flat", {layer: row(layer, 0.5 + 0.01 * (layer == 1)) for layer in range(4)})
    assert "not clear of chance" in items.peak_words(flat)
    assert "within its error" in items.drop_words(flat)
    assert items.peak_words(items.Profile("none")) == "none: not measured."


@pytest.mark.slow
def test_a_page_is_written_from_what_inspect_leaves(tmp_path: Path) -> None:
    run = tmp_path / "inspect"
    run.mkdir()
    append_layers(
        run / "layers.csv",
        [row(layer, 0.6, measure=name) for layer in range(4) for name in ("entailment/random", "objects")],
    )
    (tmp_path / "seven_b.txt").write_text("lightning-mm inspect <model>")
    command = [sys.executable, str(SCRIPTS / "paper_page.py"), "p1", "--folder", str(tmp_path)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "Figure: entailment accuracy by layer (global)" in told
    page = (tmp_path / "index.html").read_text()
    assert "<svg" in page
    assert "lightning-mm inspect &lt;model&gt;" in page
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(p1_items(tmp_path))


def test_costs_are_rows_times_flops_and_traces_the_sum_over_what_is_recomputed() -> None:
    shape = seven_b.Shape(slices=33, width=4096, inner=11008, modules=64, parameters=7_060_000_000)
    (read,) = seven_b.costs("p1", shape, 8e12, 4e8)
    assert read.flops == 2500 * 8 * 8e12
    narrow, wide, _ = seven_b.costs("p2", shape, 8e12, 4e8)
    by_hand = sum((25 - unit) * (32 - layer) * 4e8 for unit in range(25) for layer in range(32)) * 2
    assert narrow.flops == pytest.approx(9463 * (by_hand + 2 * 8e12))
    assert wide.flops > narrow.flops, "a wider window begins lower"
    slow = seven_b.Cost("bound by reading weights", flops=1.0, passes=100, memory=0.0)
    assert slow.seconds(seven_b.DEVICES["h100"], 14e9) == pytest.approx(100 * 14e9 / 3.35e12)


@pytest.mark.slow
def test_the_full_size_shape_has_what_the_commands_read(tmp_path: Path) -> None:
    text = seven_b.report("p3", seven_b.build_shape("llava-1.5-7b", tmp_path / "shape"), tmp_path, "h100")
    assert "33 slices of width 4096, outputs of 64 MLP and attention modules, down projections of 4096 x 11008" in text
    assert "73% of the FLOPs" in text
    assert "does not fit" not in text


def test_commands_name_options_that_exist() -> None:
    """Every option of the scripts is one of its verb's."""
    from lightning_mm.cli import edit, inspect, trace

    known = {
        verb: {name for action in module._parser()._actions for name in action.option_strings} | {"--convention"}
        for verb, module in (("inspect", inspect), ("trace", trace), ("edit", edit))
    }
    for script in ("p1.sh", "p2.sh", "p3.sh"):
        lines = (SCRIPTS / "papers" / script).read_text().replace("\\\n", " ").splitlines()
        for words in (line.split() for line in lines if line.startswith("run ")):
            given = {word for word in words if word.startswith("--")}
            assert given <= known[words[2]], (script, given - known[words[2]])
    for commands in seven_b.COMMANDS.values():
        for command in "\n".join(commands).replace("\\\n", " ").split("lightning-mm ")[1:]:
            words = shlex.split(command)
            assert {word for word in words if word.startswith("--")} <= known[words[0]], command
