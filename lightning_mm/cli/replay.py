"""The verb replay: run a step again that was not finite.

Data flow: options -> ``verbs.replay`` -> what is not finite, printed; exit status 1 where something is.
"""

from lightning_mm.cli.parser import Parser
from lightning_mm.core.console import result_console
from lightning_mm.verbs import replay as verb


def replay(arguments: list[str]) -> int:
    """Run a step again that was not finite, and say where NaN or infinity comes from."""
    parser = Parser(prog="lightning-mm replay", description=replay.__doc__)
    parser.add_argument("file", type=str, help="nonfinite/step-N.json in the folder of a run.")
    parser.add_argument("--checkpoint", type=str, default="last", help="Name in the run's checkpoints, or a path.")
    parser.add_argument(
        "--precision", type=verb.Precision, default="run", help="Precision: as in the run, 32-true or bf16-mixed."
    )
    found = verb.replay(**vars(parser.parse_args(arguments[1:])))
    for line in found.tables():
        result_console().print(line, highlight=False, soft_wrap=True)
    return 0 if found.cause is None else 1
