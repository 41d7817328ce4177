"""A thing that can stand in a picture: its cut-out, its name, and what is true of it.

Data flow: ``openmoji`` and ``stamps`` make Things; ``splits`` shares them out; ``studio`` draws them; ``questions``
asks about them.
Legend: a cut-out is an RGBA picture cropped to what is not transparent.
"""

from dataclasses import dataclass

from PIL import Image

from lightning_mm.data.nano.catalogue import Number


@dataclass(frozen=True, eq=False)
class Thing:
    """One thing to draw and to ask about.

    Args:
        key: Unique, and where the picture came from: ``openmoji:1F408``, ``stamps:animals/cat``.
        name: What we call it, in the singular unless ``number`` says otherwise.
        category: One of ``catalogue.CATEGORIES``, or ``other``; a continent for flags.
        group: Things of one group are never told apart and never cross a split.
        number: Grammar of the name: countable, plural only, or mass.
        cutout: The picture, cropped.
        colour: The name of the one colour that dominates it, else None.
    """

    key: str
    name: str
    category: str
    group: str
    number: Number
    cutout: Image.Image
    colour: str | None = None

    @property
    def source(self) -> str:
        """The collection it was taken from, for the licence note."""
        return self.key.partition(":")[0]


def cropped(picture: Image.Image) -> Image.Image | None:
    """The part of an RGBA picture that is not transparent; None where all of it is."""
    box = picture.getchannel("A").point(lambda alpha: 255 if alpha > 16 else 0).getbbox()
    return picture.crop(box) if box else None
