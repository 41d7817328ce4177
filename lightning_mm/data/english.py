"""English plurals and small numbers, for questions and for captions with an exchanged noun."""

COUNT_WORDS = ("zero", "one", "two", "three", "four", "five")
_UNCHANGED = ("fish", "sheep", "deer", "moose", "bison", "squid")
_NOT_MEN = ("human", "german", "roman", "shaman", "talisman", "ottoman", "caiman")
_IRREGULAR = {
    "mouse": "mice", "goose": "geese", "ox": "oxen", "tooth": "teeth", "wolf": "wolves", "scarf": "scarves",
    "knife": "knives", "leaf": "leaves", "loaf": "loaves", "tomato": "tomatoes", "potato": "potatoes",
    "mango": "mangoes", "buffalo": "buffaloes",
    "mosquito": "mosquitoes", "volcano": "volcanoes",
    "person": "people", "child": "children", "foot": "feet", "louse": "lice", "half": "halves", "calf": "calves",
    "shelf": "shelves", "bookshelf": "bookshelves", "thief": "thieves", "wife": "wives", "hero": "heroes",
}  # fmt: skip


def plural(name: str) -> str:
    """Plural of a countable noun; in "cup of tea" the plural of "cup"."""
    head, of, rest = name.partition(" of ")
    *before, last = head.split(" ")
    return " ".join([*before, _plural_word(last)]) + of + rest


def _plural_word(word: str) -> str:
    if word.endswith(_UNCHANGED):
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("man") and not word.endswith(_NOT_MEN):
        return word[:-2] + "en"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"
