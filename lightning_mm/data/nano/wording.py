"""English for the questions: articles, plurals, lists and small numbers.

Data flow: ``questions`` hands in the names of things; sentences come out.
"""

from collections.abc import Sequence

from lightning_mm.data.nano.catalogue import Number

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


def noun(name: str, number: Number = "one") -> str:
    """The name with its article, where it takes one: "a cat", "an hourglass", "bread", "grapes"."""
    if number != "one":
        return name
    return f"{'an' if name[0] in 'aeiou' or name.startswith('hour') else 'a'} {name}"


def plural(name: str) -> str:
    """More than one of a countable thing; in "cup of tea" it is the cup that is counted."""
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


def counted(name: str, number: Number, count: int) -> str:
    """A noun phrase for ``count`` of a thing: "a cat", "three cats", "bread"."""
    return noun(name, number) if count == 1 else f"{COUNT_WORDS[count]} {plural(name)}"


def listed(phrases: Sequence[str]) -> str:
    """Phrases joined as in "a cat, a dog and an apple"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def answer(phrase: str) -> str:
    """An answer as it is scored: a capital first, a full stop last."""
    return phrase[0].upper() + phrase[1:] + "."
