"""A page as a browser sees it: its tags, attributes and words; and the marks of a figure in it."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser


class Page(HTMLParser):
    """The tags, their attributes and the text of a page, as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.raw = [], [], [], text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


def marks(svg, name):
    """The elements of a view of a figure, from the back to the front."""
    groups = [group for group in ET.fromstring(svg).iter("g") if f"{name}_marks" in group.get("class", "").split()]
    return [element for group in groups for element in group]


def points(path):
    """The corners of a line or an area."""
    return [tuple(map(float, pair.split(","))) for pair in re.findall(r"[ML]([-\d.e]+,[-\d.e]+)", path.get("d"))]


def boxes(path):
    """(left, top, width, height) of each rectangle of a path."""
    found = re.findall(r"M([-\d.e]+),([-\d.e]+)h([-\d.e]+)v([-\d.e]+)h", path.get("d"))
    return [tuple(map(float, box)) for box in found]


def cells(svg, palette, name="cells"):
    """{tip: (left, top, index of the color in the palette)} of cells that say their values."""
    found = {}
    for path in marks(svg, name):
        ((left, top, _, _),) = boxes(path)
        assert path.find("title").text not in found
        found[path.find("title").text] = (left, top, palette.index(path.get("fill")))
    return found


def texts(svg, name):
    """The texts of a view."""
    return ["".join(text.itertext()) for text in marks(svg, name)]
