"""A page as a browser sees it: its tags, attributes and words; and the marks of a figure in it."""

import base64
import gzip
import hashlib
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

SCRIPT = re.compile(r"<script>(.*?)</script>", re.S)
PACKED = re.compile(r'<script type="application/gzip" id="(charts|library)">([A-Za-z0-9+/=]*)</script>')


class Page(HTMLParser):
    """The tags, attributes and text of a page as a browser would see them, but for scripts that its policy allows.

    A script without a hash in the policy stays in ``tags`` and ``raw``, as does a block that is not plain base64.
    """

    def __init__(self, text):
        super().__init__()
        self.whole = text
        self.policy = text.split('http-equiv="Content-Security-Policy" content="', 1)[-1].split('"', 1)[0]
        self.packed = dict(PACKED.findall(text))
        text = SCRIPT.sub(lambda found: "" if self.allows(found[1]) else found[0], PACKED.sub("", text))
        self.tags, self.attributes, self.words, self.raw = [], [], [], text
        self.feed(text)

    def allows(self, script):
        """Whether the policy names the hash of a script or style."""
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        return f"'sha256-{digest}'" in self.policy.replace("&#39;", "'")

    @property
    def charts(self):
        """What the page holds for its live charts."""
        return json.loads(gzip.decompress(base64.b64decode(self.packed["charts"])))

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
