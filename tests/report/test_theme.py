"""The color scale against CIELAB: evenly lighter or darker, neighbours equally far apart, ends far from the page."""

import numpy as np
import pytest

from lightning_mm.report.figures import theme
from lightning_mm.report.figures.figure import Figure, layered, view
from lightning_mm.report.figures.heatmap_parts import ColorScale, Columns
from tests.helpers.page import boxes, marks

# sRGB to XYZ (IEC 61966-2-1) and XYZ to CIELAB under D65: another space than the scale was made in
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.95047, 1.0, 1.08883])


def lab(scale):
    rgb = np.array(scale) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(linear @ TO_XYZ.T / WHITE).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("scale", [theme.LIGHT, theme.DARK])
def test_equal_steps_of_value_are_equal_steps_of_lightness(scale):
    steps = np.diff(lab(scale)[:, 0])
    assert len(scale) == theme.LEVELS
    assert abs(lab(scale)[-1, 0] - lab(scale)[0, 0]) > 70
    assert len(set(np.sign(steps))) == 1  # in grey print, too, the order stays
    # OKLab's and CIELAB's lightness differ by a few per cent over this range, and 8 bits round by half a unit
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.27)


@pytest.mark.parametrize("scale", [theme.LIGHT, theme.DARK])
def test_neighbours_are_told_apart_and_none_stands_out(scale):
    distance = np.linalg.norm(np.diff(lab(scale), axis=0), axis=1)
    assert distance.min() > 2.3  # a just noticeable difference
    assert distance.max() < 4 * distance.min()


def test_light_pages_begin_pale_and_dark_pages_begin_dark():
    assert lab(theme.LIGHT)[0, 0] > 90
    assert lab(theme.DARK)[0, 0] < 20


SIGNED = [theme.SIGNED_LIGHT, theme.SIGNED_DARK]
# how eyes without long, middle or short cones see linear sRGB (Machado, Oliveira and Fernandes 2009, severity 1)
EYES = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("scale", SIGNED)
@pytest.mark.parametrize("eye", EYES)
def test_signs_are_told_apart_by_any_eye_and_the_more_the_stronger(scale, eye):
    rgb = np.array(scale) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.array(EYES[eye]).T
    linear = linear.clip(0, 1)
    seen = lab(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))
    assert len(scale) == 2 * theme.ARM + 1
    apart = np.linalg.norm(seen - seen[::-1], axis=1)[: theme.ARM][::-1]  # at the same strength, weakest first
    assert apart[0] > 2.3  # a just noticeable difference
    assert (apart[3:] > 15).all()
    strength = np.linalg.norm(seen - seen[theme.ARM], axis=1)
    assert (np.diff(strength[theme.ARM :]) > 0).all()
    assert (np.diff(strength[theme.ARM :: -1]) > 0).all()


@pytest.mark.parametrize("scale", SIGNED)
def test_both_signs_get_equally_dark_and_zero_has_no_colour(scale):
    lightness = lab(scale)[:, 0]
    np.testing.assert_allclose(lightness, lightness[::-1], atol=6)  # OKLab's and CIELAB's lightness differ by hue
    assert np.linalg.norm(lab(scale)[theme.ARM, 1:]) < 3


@pytest.mark.parametrize(("share", "level"), [(-7, 0), (-1, 0), (-0.04, 11), (0, 11), (0.05, 12), (0.5, 17), (9, 22)])
def test_signed_levels(share, level):
    assert theme.SIGNED.index(theme.signed_color(share)) == level
    scale = ColorScale.symmetric(4.0)
    assert painted([4 * share], scale) == [theme.SIGNED[level]]


def test_levels():
    levels = {-1: 0, 0: 0, 0.5: 12, 0.999: 23, 1: 23, 7: 23}
    assert painted(list(levels), ColorScale(0, 1)) == [theme.SEQUENTIAL[level] for level in levels.values()]
    assert painted([0.0, 1.0], ColorScale(0, 1, reverse=True)) == [theme.SEQUENTIAL[23], theme.SEQUENTIAL[0]]


def painted(values, scale):
    """The colors of values, as they are rendered."""
    rows = [{"left": i, "right": i + 1, "value": value} for i, value in enumerate(values)]
    columns = Columns(0, len(values), 100)
    cells = view("cells", "cells", "rect").encode(**columns.span(), color=scale.encoding())
    figure = Figure(layered({"cells": rows}, [cells], 100, 10), {"cells": rows}, (100, 10), (0, 0), "")
    shown = {box[0]: path.get("fill") for path in marks(figure.svg(), "cells") for box in boxes(path)}
    return [color for _, color in sorted(shown.items())]


def test_each_color_has_its_own_counterpart_on_dark_pages():
    rules = theme.dark_css()
    colors = [*theme.SEQUENTIAL, *theme.SIGNED, theme.INK, theme.SOFT, theme.CARD, theme.PAPER, theme.RULE]
    colors += [theme.QUIET, theme.TEAL, theme.WASH, theme.WITHHELD, theme.BAR, theme.BAR_PEAK]
    assert len(set(colors)) == len(colors)
    for color in colors:
        assert rules.count(f'svg [fill="{color}"]{{fill:#') == 1
