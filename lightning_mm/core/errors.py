"""What a user is told when something of theirs cannot work: one screen, no traceback.

Data flow: any module raises ``UserError``; ``cli.main`` prints it and exits with status 2.
"""


class UserError(Exception):
    """A fault that the user can mend: what happened, why, and how to mend it.

    Args:
        what: What failed, naming the option, file or row.
        why: The cause, as far as it is known.
        fix: What to do next.

    Example:
        >>> print(UserError("No layer matches '40-50'.", "The model has layers 0 to 31.", "Use '8-15'."))
        No layer matches '40-50'.
          why: The model has layers 0 to 31.
          fix: Use '8-15'.
    """

    def __init__(self, what: str, why: str, fix: str) -> None:
        what, why, fix = map(printable, (what, why, fix))
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  fix: {self.fix}"


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold, as in names of files in other encodings, written as escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def first_line(error: Exception) -> str:
    """What went wrong, in short."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def missing_package(what: str, package: str) -> UserError:
    """The error for an optional package that is not installed.

    Args:
        what: The option that needs it.
        package: Its name for pip.

    Example:
        >>> print(missing_package("run.wandb online", "wandb"))
        run.wandb online needs the package wandb.
          why: It is not installed.
          fix: pip install wandb
    """
    return UserError(f"{what} needs the package {package}.", "It is not installed.", f"pip install {package}")
