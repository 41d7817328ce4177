"""A page as a browser sees it: its tags, attributes and words."""

import re
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
