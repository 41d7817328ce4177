"""The verb edit: answers of a model changed by MultEdit, measured, compared with fine-tuning, and exported.

Data flow: options -> ``verbs.edit`` -> a folder with report.html, causal.json (tables) and edits.json (all results)
-> with --out the edited model as a complete Hugging Face folder; the tables are printed.
"""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from lightning_mm.causal.editing.multedit import P2_LAYER, EditConfig
from lightning_mm.causal.questions.question import P2_PROMPT
from lightning_mm.cli.parser import Parser, parse_with_convention
from lightning_mm.core.console import PlainConsole
from lightning_mm.core.decisions import log
from lightning_mm.verbs import edit as verb
from lightning_mm.verbs.model_source import model_label


def edit(arguments: list[str]) -> int:
    """Give questions new answers by a closed-form change of one weight, and measure what else changed."""
    options = parse_with_convention(_parser, {"p2": _p2()}, arguments[1:])
    config = EditConfig(**{each.name: options.pop(each.name) for each in fields(EditConfig)})
    folder = Path(options.pop("root")) / (options.pop("name") or f"edit-{model_label(options['model'])}")
    export_to, verify = options.pop("out"), options.pop("prove")
    found = verb.edit(**options, config=config, out=folder, export_to=export_to, verify=verify)
    for table in found.tables():
        PlainConsole().print(table)
    log.info("report: %s", found.report)
    return 0


def _p2() -> dict[str, Any]:
    """Defaults under ``--convention p2``: each edit alone, in the layer of the released code."""
    return {"prompt": P2_PROMPT, "layer": P2_LAYER, "apply": "each", **asdict(EditConfig.p2())}


def _parser() -> Parser:
    parser = Parser(prog="lightning-mm edit", description=edit.__doc__)
    parser.add_argument("model", type=str, help="Model folder or hub name, a run's folder, or a checkpoint of a run.")
    parser.add_argument("--edits", type=str, required=True, help="JSON or JSONL: questions with new answers.")
    parser.add_argument("--image_root", type=str | None, default=None, help="Folder of its pictures; its own if unset.")
    parser.add_argument("--limit", type=int | None, default=None, help="Only the first so many edits.")
    parser.add_argument(
        "--layer",
        type=int | Literal["auto"],
        default="auto",
        help="Which block's down projection; auto: the best for the first edits (--scan of them).",
    )
    parser.add_argument("--scan", type=int, default=4, help="Edits that layers are tried with.")
    parser.add_class_arguments(EditConfig)
    parser.add_argument(
        "--apply",
        type=Literal["each", "together", "both"],
        default="both",
        help="Measure each edit alone, all at once in one weight, or both.",
    )
    parser.add_argument("--control", type=bool, default=True, help="Fine-tune the same weight too, to compare.")
    parser.add_argument("--data", type=str | None, default=None, help="Conversations for the general task's loss.")
    parser.add_argument("--conversations", type=int, default=16, help="Most of them.")
    parser.add_argument("--num_unrelated", type=int, default=8, help="Unrelated questions asked after each edit.")
    parser.add_argument("--max_new_tokens", type=int, default=8, help="Longest answer that must stay.")
    parser.add_argument("--prompt", type=str, default="{question}", help="How questions are worded.")
    parser.add_argument("--checkpoint", type=str, default="last", help="Of a run: name in its checkpoints.")
    parser.add_argument("--out", type=str | None, default=None, help="Export the model with all edits to this folder.")
    parser.add_argument("--prove", type=bool, default=True, help="Compare the export's logits in a fresh process.")
    parser.add_argument("--root", type=str, default="runs", help="Folder of all runs.")
    parser.add_argument("--name", type=str | None, default=None, help="Name of the folder to make.")
    return parser
