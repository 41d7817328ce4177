"""What a study says of planted results: a better arm is called better, equal ones are not told apart."""

import re
from pathlib import Path

import pytest

from lightning_mm.core.errors import UserError
from lightning_mm.study.comparison import compare_arms
from lightning_mm.study.folder import Job, StudyFolder
from lightning_mm.study.report import write_study_report
from lightning_mm.study.results import StudyResults
from lightning_mm.study.sentences import tell
from tests.helpers.study import ARMS, plant_study


def said(folder: Path) -> dict[str, tuple[str, ...]]:
    results = StudyResults.read(folder)
    return {section.title: section.sentences for section in tell(results, compare_arms(results))}


def test_a_better_arm_is_called_better_and_its_price_is_told(tmp_path: Path) -> None:
    shares = {"middle": 0.56, "late": 0.56, "full": 0.50}
    told = said(plant_study(tmp_path, shares, text={"middle": 0.05, "full": 0.25}))
    alone = told["Is middle better than connector alone?"]
    assert alone[0] == "Better."
    spelled = r"known: middle answers 5\d\.\d % exactly, against connector \+\d+\.\d points \(\+.* to \+.*\), by seed"
    assert re.search(spelled, alone[1])
    assert re.fullmatch(
        r"known: the right answers, -0\.\d+ nats \(-.* to -.*\) each .* connector: more likely\.", alone[2]
    )
    rivals = told["Is middle better than its rivals of equal budget?"]
    assert rivals[0] == "Of 2 comparisons: 1 better, no difference found in 1."
    assert rivals[1].endswith(": better.")
    assert "against early" in rivals[1]
    assert rivals[2].endswith(": no difference found.")
    assert "against late" in rivals[2]
    full = told["Is middle better than training everything?"]
    assert full[0] == "Better."
    assert "A step of middle costs 60% of full's FLOPs and 60% of its seconds." in full
    losses = told["What does it cost in text and facts?"]
    assert "middle +0.050 nats" in losses[0]
    assert "full +0.250 nats" in losses[0]
    assert "No loss found: connector, early, late, auto." in losses[0]
    assert any(line.startswith("middle loses less text than full, -0.200 nats") for line in losses)
    assert "No change found in any arm." in losses[-2]


def test_equal_arms_are_not_told_apart(tmp_path: Path) -> None:
    told = said(plant_study(tmp_path, {}))
    alone = told["Is middle better than connector alone?"]
    assert (alone[0], alone[2][-21:]) == ("No difference found.", " no difference found.")
    assert (
        told["Is middle better than its rivals of equal budget?"][0] == "No difference found in any of 2 comparisons."
    )
    assert told["Does auto choose better layers?"][0] == "No difference found."
    assert told["Does any arm beat the control?"] == ("known, 5 arms: no difference found.",)
    everything = " ".join(line for lines in told.values() for line in lines)
    assert not re.search(r"(?<!no )\b(better|worse)\b", everything.lower())


def test_a_worse_arm_is_called_worse(tmp_path: Path) -> None:
    told = said(plant_study(tmp_path, {"middle": 0.35}))
    assert told["Is middle better than connector alone?"][0] == "Worse."


def test_layers_and_causes(tmp_path: Path) -> None:
    told = said(plant_study(tmp_path / "same", {}))
    layers = told["Where do the layers know what?"]
    assert "before: highest at layer 6 (entailment/hard at last: 0.8, 0.75 to 0.85, chance 0.5" in layers[0]
    assert "after middle: highest at layer 6" in layers[0]
    # Standard errors of value and chance are 0.05 / 1.96 each; 2.64 of both at 5 % over 12: layers 3 to 9.
    assert "clear of chance in 7 of 12 layers" in layers[0]
    agree = told["Do causal layers agree with the geometry?"]
    assert len(agree) == 2
    assert "alike: ablation skip with meeting (rank correlation +1.00" in agree[0]
    apart = said(plant_study(tmp_path / "apart", {}, peak=2, causal_peak=9))
    assert not any("alike" in line for line in apart["Do causal layers agree with the geometry?"])


def test_pictures_count_and_types_at_chance_are_named(tmp_path: Path) -> None:
    told = said(plant_study(tmp_path, {}))["Does the picture count, and which questions stay at chance?"]
    assert told[0].startswith("known, own picture against another one: stage1 +2")
    # Every type has one answer in the planted test, which a guess always gets right.
    assert "not above the most frequent answer in middle: category, colour, count, side." in told[1]


def test_what_is_not_complete_is_left_out_and_said(tmp_path: Path) -> None:
    plant_study(tmp_path, {"middle": 0.56})
    folder = StudyFolder(tmp_path)
    folder.result(Job("early", 2)).unlink()
    found = compare_arms(StudyResults.read(tmp_path))
    assert (found.arms, found.seeds) == (list(ARMS), [0, 1])
    assert "early, seed 2" in found.incomplete
    for seed in (0, 1):
        folder.result(Job("early", seed)).unlink()
    found = compare_arms(StudyResults.read(tmp_path))
    assert "early" not in found.arms
    assert found.seeds == [0, 1, 2]
    with pytest.raises(UserError, match="is no study"):
        StudyResults.read(tmp_path / "nowhere")


def test_the_page_and_the_text_hold_the_sentences(tmp_path: Path) -> None:
    plant_study(tmp_path, {"middle": 0.56}, seeds=2, text={"full": 0.2})
    page = write_study_report(tmp_path).read_text()
    text = (tmp_path / "study.md").read_text()
    for sentence in (line for lines in said(tmp_path).values() for line in lines):
        assert sentence in text
    assert "Is middle better than connector alone? Better." in page
    assert page.count("<figure") >= 8
    assert "<script src" not in page
    assert "| colour | 250 |" in text
    assert "Left out" not in text
