"""The verb inspect: the callbacks' analyses on any model folder, run or checkpoint, without training; or two compared.

Data flow: options -> ``verbs.inspect`` -> a folder with report.html, layers.csv and JSON; the peaks are printed.
"""

from pathlib import Path

from lightning_mm.analysis.probing import ProbingOptions
from lightning_mm.cli.parser import Parser
from lightning_mm.core.console import PlainConsole
from lightning_mm.core.decisions import log
from lightning_mm.layer_selection.select import AutoRange
from lightning_mm.verbs import inspect as verb
from lightning_mm.verbs.model_source import model_label


def inspect(arguments: list[str]) -> int:
    """Read every layer of a model: probes, geometry, and which layers are worth training."""
    options = vars(_parser().parse_args(arguments[1:]))
    root, name = options.pop("root"), options.pop("name")
    paths = [path for path in (options["model"], options["against"]) if path is not None]
    options["probing"] = ProbingOptions(**vars(options["probing"]))
    options["auto"] = AutoRange(**vars(options["auto"]))
    found = verb.inspect(**options, out=Path(root) / (name or "inspect-" + "-".join(map(model_label, paths))))
    for table in found.tables():
        PlainConsole().print(table)
    log.info("report: %s", found.report)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="lightning-mm inspect", description=inspect.__doc__)
    parser.add_argument("model", type=str, help="Model folder or hub name, a run's folder, or a checkpoint of a run.")
    parser.add_argument("--against", type=str | None, default=None, help="A second one, to see what differs.")
    parser.add_argument(
        "--probes",
        type=str | None,
        default=None,
        help="File of pictures with captions and objects (rows, LLaVA JSON, COCO annotations); a run knows its own.",
    )
    parser.add_argument(
        "--data", type=str | None, default=None, help="Conversations for the gradient criteria; a run knows its own."
    )
    parser.add_argument(
        "--image_root",
        type=str | None,
        default=None,
        help="Folder that the pictures of --probes and --data are relative to; each file's own folder if not given.",
    )
    parser.add_argument(
        "--images", type=int | None, default=None, help="Most pictures; a run's own number, else 256, if not given."
    )
    parser.add_argument(
        "--max_length", type=int | None, default=None, help="Longest row in tokens; a run's own, else 2048."
    )
    parser.add_argument("--checkpoint", type=str, default="last", help="Of a run: name in its checkpoints.")
    parser.add_argument("--measures", type=list[str] | None, default=None, help="Geometry measures, or [all].")
    parser.add_argument("--neighbours", type=int, default=10, help="k of the neighbourhood measures.")
    parser.add_argument("--svcca_variance", type=float, default=0.99, help="Variance that SVCCA's directions explain.")
    parser.add_argument(
        "--both_last",
        type=bool,
        default=False,
        help="Read picture and caption in one prompt too, each once as the last of the two (site token_last).",
    )
    parser.add_class_arguments(ProbingOptions, "probing")
    parser.set_defaults({"probing.selectivity": True})
    parser.add_argument("--text_only", type=bool, default=True, help="Probe the captions alone too.")
    parser.add_argument("--select", type=bool, default=True, help="Say which layers are worth training.")
    parser.add_class_arguments(AutoRange, "auto")
    parser.add_argument("--batch_size", type=int, default=16, help="Rows per forward pass.")
    parser.add_argument("--bf16", type=bool, default=False, help="Compute the model's forward pass in bfloat16.")
    parser.add_argument("--root", type=str, default="runs", help="Folder of all runs.")
    parser.add_argument("--name", type=str | None, default=None, help="Name of the folder to make.")
    return parser
