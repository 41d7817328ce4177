"""The verbs export and report, on a finished run.

Data flow: options -> ``verbs.export_model`` -> a folder that transformers or PEFT loads; or -> ``report.html``, written
again.
"""

import sys

from lightning_mm.cli.parser import Parser
from lightning_mm.models.export.weight_dtype import WrittenDtype
from lightning_mm.report.html import write_report
from lightning_mm.verbs.export_model import Format, export_model


def export(arguments: list[str]) -> int:
    """Write a trained run as a Hugging Face folder."""
    parser = Parser(prog="lightning-mm export", description=export.__doc__)
    parser.add_argument("run", type=str, help="The run's folder, such as runs/IntermediateOnly.")
    parser.add_argument("--out", type=str | None, default=None, help="Folder to make; RUN/export if not given.")
    parser.add_argument(
        "--format",
        type=Format,
        default="model",
        help="model: a complete folder (adapters merged); merged: the same, of a LoRA run; adapter: a PEFT folder.",
    )
    parser.add_argument("--checkpoint", type=str, default="last", help="Name in RUN/checkpoints, or a path.")
    parser.add_argument(
        "--dtype",
        type=WrittenDtype,
        default="auto",
        help="Dtype of a complete folder's weights; auto: the base model's, which trained weights are rounded to.",
    )
    parser.add_argument(
        "--prove", type=bool, default=True, help="Compare logits and the answer to a picture with a fresh process."
    )
    parser.add_argument(
        "--push_to_hub", type=str | None, default=None, help="Hub repository to upload to, owner/name; needs HF_TOKEN."
    )
    parser.add_argument("--private", type=bool, default=True, help="Make a new hub repository private.")
    options = vars(parser.parse_args(arguments[1:]))
    verify = options.pop("prove")
    export_model(**options, verify=verify)
    return 0


def report(arguments: list[str]) -> int:
    """Write report.html of a run anew, or one page that compares several runs."""
    parser = Parser(prog="lightning-mm report", description=report.__doc__)
    parser.add_argument("runs", type=str, nargs="+", help="The run's folder; several are compared on one page.")
    parser.add_argument("--out", type=str | None, default=None, help="The file; report.html in the run if not given.")
    options = parser.parse_args(arguments[1:])
    print(write_report(*options.runs, out=options.out), file=sys.stdout)
    return 0
