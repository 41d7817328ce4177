"""Factual questions whose key is a flag: the picture says which country, the language model must know the rest.

Data flow: ``openmoji`` hands in flags with their countries; Questions go to ``build``.
"""

from collections.abc import Mapping

from lightning_mm.data.nano.countries import Country
from lightning_mm.data.nano.questions import Question
from lightning_mm.data.nano.studio import Picture
from lightning_mm.data.nano.wording import answer

FLAG_TYPES = ("flag_country", "flag_capital", "flag_continent")


class FlagExaminer:
    """Asks about flags.

    Args:
        countries: By the key of the flag's Thing.
    """

    def __init__(self, countries: Mapping[str, Country]) -> None:
        self._countries = countries

    def ask(self, kind: str, picture: Picture) -> Question | None:
        """A question of a type about the country of the flag; None where the fact is not one we state."""
        country = self._countries[picture.target.key]
        text, fact = {
            "flag_country": ("Which country has this flag?", country.name),
            "flag_capital": ("What is the capital of the country with this flag?", country.capital),
            "flag_continent": ("On which continent is the country with this flag?", country.continent),
        }[kind]
        return Question(kind, text, answer(fact)) if fact else None
