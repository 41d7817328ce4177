"""The verb trace: what causes a model's answers, on any model folder, run or checkpoint, without training.

Data flow: options -> ``verbs.trace`` -> a folder with report.html, layers.csv, traces.json, pictures.json and
causal.json; the strongest effects are printed.
"""

from pathlib import Path
from typing import Any

from lightning_mm.causal.effects.activation_patching import TraceConfig
from lightning_mm.causal.effects.attention_flow import FLOW_EDGES
from lightning_mm.causal.effects.knockout_curves import KnockoutConfig
from lightning_mm.causal.effects.layer_transplant import TransplantConfig
from lightning_mm.causal.interventions.corruption import Places
from lightning_mm.causal.questions.question import P2_PROMPT
from lightning_mm.causal.study import PARTS, StudyConfig
from lightning_mm.cli.parser import Parser, parse_with_convention
from lightning_mm.core.console import PlainConsole
from lightning_mm.core.decisions import log
from lightning_mm.verbs import trace as verb
from lightning_mm.verbs.model_source import model_label


def trace(arguments: list[str]) -> int:
    """Find what causes a model's answers: causal traces, flow, knockout, ablation, lens, transplantation."""
    options = parse_with_convention(_parser, {"p2": _p2()}, arguments[1:])
    study = StudyConfig(
        parts=tuple(options.pop("parts")),
        corruption=options.pop("corruption"),
        trace=TraceConfig(**vars(options.pop("tracing"))),
        knockout=KnockoutConfig(**vars(options.pop("knocking"))),
        num_shown=options.pop("shown"),
        seed=options.pop("seed"),
        places=options.pop("places"),
        flow=tuple(options.pop("flow")),
    )
    options["transplant"] = TransplantConfig(**vars(options["transplant"]))
    folder = Path(options.pop("root")) / (options.pop("name") or f"trace-{model_label(options['model'])}")
    found = verb.trace(**options, study=study, out=folder)
    for table in found.tables():
        PlainConsole().print(table)
    log.info("report: %s", found.report)
    return 0


def _p2() -> dict[str, Any]:
    """Defaults under ``--convention p2``."""
    study = StudyConfig.p2()
    tracing = {f"tracing.{name}": getattr(study.trace, name) for name in ("width", "convention", "sites")}
    return {"prompt": P2_PROMPT, "corruption": study.corruption, "places": study.places, **tracing}


def _parser() -> Parser:
    parser = Parser(prog="lightning-mm trace", description=trace.__doc__)
    parser.add_argument("model", type=str, help="Model folder or hub name, a run's folder, or a checkpoint of a run.")
    parser.add_argument(
        "--questions",
        type=str,
        required=True,
        help="Questions with constraints: VQA-Constraints' CSV, or rows such as nano/data/constraints.json.",
    )
    parser.add_argument("--image_root", type=str | None, default=None, help="Folder of the pictures; else the file's.")
    parser.add_argument("--prompt", type=str, default="{question}", help="How a question is worded.")
    parser.add_argument("--kinds", type=list[str] | None, default=None, help="Only questions of these kinds.")
    parser.add_argument("--ask", type=int, default=256, help="Most questions that are asked.")
    parser.add_argument("--limit", type=int, default=48, help="Most right answers that are looked into.")
    parser.add_argument("--parts", type=list[str], default=list(PARTS), help="What to find out.")
    parser.add_argument("--corruption", type=str, default="token", help="token, symmetric, image, gaussian or grey.")
    parser.add_argument("--places", type=Places, default="all", help="Places of a constraint that are corrupted.")
    parser.add_class_arguments(TraceConfig, "tracing")
    parser.add_argument("--flow", type=list[str], default=list(FLOW_EDGES), help="Edges of attention flow.")
    parser.add_class_arguments(KnockoutConfig, "knocking")
    parser.add_argument("--against", type=str | None, default=None, help="A tuned model whose layers are transplanted.")
    parser.add_argument("--data", type=str | None, default=None, help="Conversations that hybrids are asked.")
    parser.add_class_arguments(TransplantConfig, "transplant")
    parser.add_argument("--batches", type=int, default=8, help="Batches of them.")
    parser.add_argument("--shown", type=int, default=12, help="Questions whose maps and pictures are drawn.")
    parser.add_argument("--seed", type=int, default=0, help="Of corruptions.")
    parser.add_argument("--bf16", type=bool, default=False, help="Compute the model's forward pass in bfloat16.")
    parser.add_argument("--checkpoint", type=str, default="last", help="Of a run: name in its checkpoints.")
    parser.add_argument("--batch_size", type=int, default=8, help="Conversations per forward pass.")
    parser.add_argument("--max_length", type=int | None, default=None, help="Longest conversation, in tokens.")
    parser.add_argument("--root", type=str, default="runs", help="Folder of all runs.")
    parser.add_argument("--name", type=str | None, default=None, help="Name of the folder to make.")
    return parser
