"""What the command line does, as functions: one file per verb, from dataclasses to a dataclass that prints itself."""
