"""The parser of the command line, and its errors on one screen.

Data flow: arguments -> ``Parser`` -> options, or jsonargparse's message -> ``UserError``. ``JSONARGPARSE_DEBUG=1``
shows the library's own traceback.
"""

from typing import Any, NoReturn

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
