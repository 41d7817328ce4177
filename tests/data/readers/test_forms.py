"""Every form that is accepted gives the samples of its twin in LLaVA's JSON: same turns, same pictures."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from lightning_mm.core.decisions import decision_log
from lightning_mm.data.images import load
from lightning_mm.data.readers.source import OpenSource, PartReport, ReadOptions, open_source, parse_sources
from lightning_mm.data.sample import Rejection, Sample
from tests.helpers.data_forms import FORMS


def read(given: Any, **options: Any) -> list[Sample | Rejection]:
    opened = [open_source(source, ReadOptions(**options)) for source in parse_sources(given)]
    return [row for source in opened for row in rows_of(source)]


def rows_of(source: OpenSource) -> list[Sample | Rejection]:
    return [row for part in source.parts() for row in source.read(part, PartReport())]


def pixels(sample: Sample) -> list[Image.Image]:
    return [load(image).image for image in sample.images]


@pytest.mark.parametrize("name", FORMS)
def test_a_form_reads_as_its_twin(tmp_path: Path, name: str) -> None:
    made = FORMS[name](tmp_path)
    (tmp_path / "twin.json").write_text(json.dumps(made.twin))
    twins, samples = read(str(tmp_path / "twin.json")), read(made.given)
    assert [row for row in [*twins, *samples] if isinstance(row, Rejection)] == []
    assert len(samples) == len(twins)
    for sample, twin in zip(samples, twins, strict=True):
        assert isinstance(sample, Sample)
        assert isinstance(twin, Sample)
        assert sample.turns == twin.turns
        assert sample.tools == twin.tools
        assert [video.name for video in sample.videos] == [video.name for video in twin.videos]
        assert len(sample.images) == len(twin.images)
        for mine, its in zip(pixels(sample), pixels(twin), strict=True):
            assert ImageChops.difference(mine, its).getbbox() is None
        assert json.dumps(dict(sample.extra)).count("bytes") == 0
    assert any(decision.name.startswith("data.source.") for decision in decision_log())


def test_the_docs_list_every_form() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data-forms.md").read_text(encoding="utf-8")
    listed = {line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")}
    assert [name for name in FORMS if name not in listed] == []
    assert len(FORMS) >= 60
