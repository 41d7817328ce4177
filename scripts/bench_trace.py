"""How much cheaper a trace is than the plain loop of 2406.04236, at the same numbers.

Data flow: a model + one of its questions -> both, in one run -> a ratio of CPU times on the screen and
benchmarks/trace.json.

The plain loop runs the whole model on three rows (clean, corrupt, corrupt and restored) for every layer, text token and
site. A sample of its passes is timed and compared number by number; its time is scaled up to all of them. Run it from
the repository: python scripts/bench_trace.py MODEL QUESTIONS
"""

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
from machine import processor

from lightning_mm.causal.effects.activation_patching import TraceConfig, causal_trace
from lightning_mm.causal.interventions.corruption import CorruptedQuestion, corrupt_question
from lightning_mm.causal.interventions.interventions import Intervention, apply_interventions
from lightning_mm.causal.questions.files import read_questions
from lightning_mm.causal.questions.question import EncodedQuestion, QuestionEncoder
from lightning_mm.causal.questions.scoring import answer_questions
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.models.processor import load_processing

SITES = ("mlp", "attention")


def main() -> None:
    """Compare and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("questions")
    parser.add_argument("--passes", type=int, default=40, help="Of the plain loop that are timed.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/trace.json"))
    args = parser.parse_args()
    model: Any = load_model(Backbone(path=args.model))
    model.eval().requires_grad_(False)
    layout, processing = ModelLayout.of(model), load_processing(args.model)
    encoded, corrupt, target = _question(model, layout, processing, args.questions)
    began = time.process_time()
    found = causal_trace(MultimodalModel(model, layout), encoded, corrupt, TraceConfig(sites=SITES), target)
    ours = time.process_time() - began
    first = int(found.units[0][0])
    text = [position for position in range(encoded.length) if position not in set(encoded.image.tolist())]
    every = [(site, layer, token) for site in SITES for layer in range(layout.num_layers) for token in text]
    drawn = random.Random(0).sample(every, min(args.passes, len(every)))
    began = time.process_time()
    plain = [_restored(model, layout, encoded, corrupt, target, *each) for each in drawn]
    theirs = (time.process_time() - began) / len(drawn) * len(every)
    units = {int(unit[0]): number for number, unit in enumerate(found.units)}
    differences = [
        abs(p - (float(found.restored[SITES.index(site), layer, units[token]]) if token >= first else found.p_corrupt))
        for p, (site, layer, token) in zip(plain, drawn, strict=True)
    ]
    told = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "model": type(model).__name__,
        "shape": {
            "layers": layout.num_layers,
            "tokens": encoded.length,
            "image_tokens": len(encoded.image),
            "text_tokens": len(text),
            "from_first_changed": encoded.length - first,
        },
        "cpu_seconds": round(ours, 2),
        "plain_cpu_seconds": round(theirs, 1),
        "plain_passes": {"timed": len(drawn), "all": len(every)},
        "ratio": round(theirs / ours, 1),
        "largest_difference_of_probability": max(differences),
    }
    print(json.dumps(told, indent=2))
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(told, indent=2) + "\n")


def _question(
    model: Any, layout: ModelLayout, processing: Any, path: str
) -> tuple[EncodedQuestion, CorruptedQuestion, int]:
    """The first question that is answered right and can be corrupted."""
    encoder = QuestionEncoder(processing)
    for question in read_questions(path).questions:
        encoded = encoder.encode(question)
        if isinstance(encoded, EncodedQuestion):
            for answer in answer_questions(MultimodalModel(model, layout), encoder, [encoded], torch.device("cpu"))[0]:
                corrupt = corrupt_question(encoded, "token", [encoded], processing, MultimodalModel(model, layout))
                if answer.right and isinstance(corrupt, CorruptedQuestion):
                    return encoded, corrupt, answer.target
    raise SystemExit("no question is answered right")


@torch.no_grad()
def _restored(
    model: Any,
    layout: ModelLayout,
    encoded: EncodedQuestion,
    corrupt: CorruptedQuestion,
    target: int,
    site: Any,
    layer: int,
    token: int,
) -> float:
    """One pass of the plain loop: three rows, the last one restored."""
    rows = {
        name: torch.cat([encoded.inputs[name], tensor, tensor])
        if tensor.shape[0] == 1
        else torch.cat([encoded.inputs[name]] * 3)
        for name, tensor in corrupt.inputs.items()
    }

    def restore(change: Any) -> torch.Tensor:
        return torch.cat([change.output[:2], change.output[:1]])

    with apply_interventions(
        MultimodalModel(model, layout), [Intervention("restore", site, (layer,), torch.tensor([token]), restore)]
    ):
        logits = model(**rows, use_cache=False).logits[2, -1].double()
    return float(logits.softmax(-1)[target])


if __name__ == "__main__":
    main()
