"""The parser of the command line, and its errors on one screen.

Data flow: arguments -> ``Parser`` -> options, or jsonargparse's message -> ``UserError``. ``JSONARGPARSE_DEBUG=1``
shows the library's own traceback.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_mm.cli.explain_errors import explain_message


class Parser(LightningArgumentParser):
    """The parser of all verbs; its errors are ``UserError``s that fit on one screen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviated option could silently match another one.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a ``UserError`` instead of printing the usage of hundreds of options."""
        if not self.exit_on_error:
            super().error(message, ex)
        verbs = self._subcommands_action.choices.values() if self._subcommands_action else ()
        actions = [action for parser in (self, *verbs) for action in parser._actions]
        raise explain_message(message, [name for action in actions for name in action.option_strings])


Convention = Literal["own", "p2"]
"""Whose defaults a verb has: this package's, or those of the code released with Basu et al. 2024 (arXiv:2406.04236)."""


def parse_with_convention(
    make: Callable[[], Parser], defaults: Mapping[str, Mapping[str, Any]], arguments: Sequence[str]
) -> dict[str, Any]:
    """The options of a verb with ``--convention``; one that is given stands, whatever the convention has.

    Args:
        make: Makes the verb's parser.
        defaults: Convention -> its defaults by option.
        arguments: Arguments without the verb.
    """

    def parse(changed: Mapping[str, Any]) -> dict[str, Any]:
        parser = make()
        parser.add_argument(
            "--convention",
            type=Convention,
            default="own",
            help="p2: defaults as in the code released with 2406.04236; options that are given stand.",
        )
        parser.set_defaults(dict(changed))
        return vars(parser.parse_args(list(arguments)))

    options = parse({})
    options = parse(defaults[options["convention"]]) if options["convention"] in defaults else options
    del options["convention"]
    return options
