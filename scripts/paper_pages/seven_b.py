"""What the commands of a page cost with LLaVA-1.5-7B on one GPU, and whether they fit its shape; nothing is loaded.

    python -m paper_pages.seven_b p2 --folder runs/papers/p2

The shape is the released configuration with random weights on the meta device: its forward pass is run with the hooks
that ``inspect`` and ``trace`` use, so that every layer, module and width they need is found. FLOPs are those of
``plan``'s cost model. Seconds: products at 45 % of the peak, or the weights read once per pass, whichever is longer;
decoding of pictures, probes and geometry on the GPU come on top.

Data flow: shape folder -> meta forward pass -> widths; ``plan`` of a row -> forward FLOPs by part -> passes -> table.

Shapes: L decoder blocks, D hidden size, F inner size of the MLP, T text tokens.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mm.data.batch import Batch
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import block_io
from lightning_mm.models.layout import ModelLayout, Region
from lightning_mm.models.loading import Backbone, load_skeleton
from lightning_mm.models.processor import load_processor
from lightning_mm.planning.devices import DEVICES, Device
from lightning_mm.planning.meta_modes import MetaWeightsMode, make_traceable, meta_weights
from lightning_mm.testing import build_shape
from lightning_mm.tuning import Full, IntermediateOnly
from lightning_mm.verbs.plan import plan
from lightning_mm.verbs.plan_batches import RowMaker

PICTURES, QUESTIONS, TEXT = 2500, 9463, 32
"""Samples of 2606.03871; questions of VQA-Constraints as released; text tokens of a prompt, template included."""
TRACED = 25
"""Tokens from the constraint on (576 and those before it are equal in both runs)."""
BYTES = 2
_BATCH_TOKENS = 512


@dataclass(frozen=True)
class Shape:
    """What the meta pass found.

    Args:
        slices: Hidden states that were handed over, embeddings included.
        width: D.
        inner: F.
        modules: MLP and attention modules whose output was seen.
        parameters: Number of weights.
    """

    slices: int
    width: int
    inner: int
    modules: int
    parameters: int

    @property
    def layers(self) -> int:
        return self.slices - 1


@dataclass(frozen=True)
class Cost:
    """One part of a page's commands.

    Args:
        name: What it is.
        flops: All of it.
        passes: How often the weights are read.
        share: Of the weights that a pass reads.
        memory: Bytes at its peak.
    """

    name: str
    flops: float
    passes: float
    memory: float
    share: float = 1.0

    def seconds(self, device: Device, weights: float) -> float:
        """Predicted."""
        products = self.flops / (device.bf16 * device.utilization)
        return max(products, self.passes * self.share * weights / device.bandwidth)


def check_shape(folder: Path, scratch: Path) -> Shape:
    """Run the shape's forward pass on the meta device with the hooks of ``inspect`` and ``trace``.

    Args:
        folder: Of ``build_shape``.
        scratch: For a row with a picture.
    """
    backbone = Backbone(path=str(folder))
    batch = RowMaker(load_processor(str(folder)), 1, scratch).of(None, TEXT, 4)
    with meta_weights():
        skeleton = make_traceable(load_skeleton(backbone))
    mm = MultimodalModel(skeleton, ModelLayout.of(skeleton))
    seen: dict[int, tuple[int, ...]] = {}
    outputs: list[tuple[int, ...]] = []
    hooks = [
        mm.model.get_submodule(name).register_forward_hook(_shape_of(outputs))
        for block in mm.layout.blocks
        for name in (block.mlp, block.attention)
        if name is not None
    ]
    try:
        with torch.no_grad(), MetaWeightsMode(), block_io(mm, lambda i, hidden: seen.update({i: tuple(hidden.shape)})):
            mm.model(**_inputs(batch), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    down = mm.layout.blocks[2].down_proj
    assert down is not None, "P2 edits the down projection of block 2"
    weight: Tensor = mm.model.get_submodule(down).weight  # type: ignore[assignment]
    length = batch.regions.shape[1]
    assert set(seen.values()) == {(1, length, weight.shape[0])}, seen
    assert set(outputs) == {(1, length, weight.shape[0])}, set(outputs)
    return Shape(len(seen), weight.shape[0], weight.shape[1], len(outputs), _count(mm.model))


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return dict(batch.inputs)


def _shape_of(found: list[tuple[int, ...]]) -> Callable[..., None]:
    return lambda _, __, output: found.append(tuple((output if isinstance(output, Tensor) else output[0]).shape))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def costs(paper: str, shape: Shape, row: float, block: float) -> list[Cost]:
    """The parts of a paper's commands.

    Args:
        paper: p1, p2 or p3.
        shape: As ``check_shape`` found it.
        row: Forward FLOPs of a row with a picture and ``TEXT`` text tokens.
        block: Forward FLOPs of one token in one block.
    """
    weights, rows = shape.parameters * BYTES, 16
    bank = shape.slices * PICTURES * shape.width * 4
    if paper == "p1":
        count = PICTURES * 8  # true, random and hard caption, each without its picture too; objects' row, caption alone
        return [Cost(f"{count:,} rows read, all layers", count * row, count / rows, weights + 5 * bank)]
    if paper == "p3":
        count = 2 * PICTURES * 7  # three captions, picture, caption, both in either order; before and after tuning
        hybrids = shape.layers // 2 * 2 + 1
        return [
            Cost(f"{count:,} rows read, two models", count * row, count / rows, 2 * weights + 8 * bank),
            Cost(
                f"{hybrids} hybrids answer {PICTURES:,} rows",
                hybrids * PICTURES * row,
                hybrids * PICTURES / 8,
                2 * weights,
            ),
        ]
    made = []
    for window in (1, 5):
        tokens = 2 * TRACED * (TRACED + 1) / 2  # both sites; a unit's tokens up to the end
        below = [max(0, layer - (window if window > 1 else 0)) for layer in range(shape.layers)]
        above = sum(shape.layers - layer for layer in below)
        flops = QUESTIONS * (tokens * above * block + 2 * row)
        read = QUESTIONS * 2 * above / shape.layers * max(1, TRACED * (TRACED + 1) / 2 / _BATCH_TOKENS)
        made.append(Cost(f"trace, window {window}, {QUESTIONS:,} questions", flops, read, weights + 2e9))
    steps = 500 * 10 * 3 * 2  # 500 edits, ten steps, backward twice a forward, as released and with a clamp
    tail = steps * (TRACED * (shape.layers - 2) * block)
    asked = 500 * 2 * 20 * row  # paraphrases, pictures, neighbors and unrelated questions after each
    return [
        *made,
        Cost("500 edits, twice, with what is asked after each", tail + asked, steps + 500 * 40, weights + 4e9),
    ]


def main() -> None:
    """Print and write seven_b.txt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paper", choices=("p1", "p2", "p3"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", default="h100", choices=sorted(DEVICES))
    args = parser.parse_args()
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = folder.parent / "llava-1.5-7b-shape"
    if not (model / "config.json").is_file():
        build_shape("llava-1.5-7b", model)
    text = report(args.paper, model, folder, args.device)
    (folder / "seven_b.txt").write_text(text)
    print(text)


def report(paper: str, model: Path, scratch: Path, device: str) -> str:
    """The commands for the full model, what was checked of its shape, and what they cost."""
    shape = check_shape(model, scratch)
    options: dict[str, Any] = {"image_tokens": 576, "text_tokens": TEXT, "supervised": 4, "batch_size": 1}
    options |= {"device": device, "precision": "bf16-mixed", "compare": False}
    own = plan(str(model), IntermediateOnly(layers="6-16"), **options).own
    row = sum(part.forward for part in own.flops.by_part.values())
    block = own.flops.region(Region.LAYERS).forward / shape.layers / (576 + TEXT)
    on, weights = DEVICES[device], shape.parameters * BYTES
    lines = [
        *COMMANDS[paper],
        "",
        f"checked on the meta device: {shape.slices} slices of width {shape.width}, outputs of {shape.modules} MLP and "
        f"attention modules, down projections of {shape.width} x {shape.inner}; {shape.parameters / 1e9:.2f} G weights",
        f"a row of 576 picture and {TEXT} text tokens: {row / 1e12:.2f} TFLOP forward",
        f"predicted on {on.name} in bfloat16 at {on.utilization:.0%} of its peak, without decoding, probes, geometry:",
    ]
    for cost in costs(paper, shape, row, block):
        seconds = cost.seconds(on, weights)
        fits = "fits" if cost.memory < on.memory else "does not fit"
        lines.append(
            f"  {cost.name}: {cost.flops / 1e15:,.1f} PFLOP, {cost.memory / 2**30:.0f} GiB ({fits}), {_time(seconds)}"
        )
    if paper == "p3":
        lines += _tuning(model, options, device)
    return "\n".join(lines) + "\n"


def _tuning(model: Path, options: dict[str, Any], device: str) -> Sequence[str]:
    """A step of full tuning and of the published range, by ``plan``."""
    options = options | {"text_tokens": 64, "supervised": 16, "batch_size": 4}
    full = plan(str(model), Full(), **options).own
    part = plan(str(model), IntermediateOnly(layers="6-16"), **options).own
    shares = f"{part.run / full.run:.0%} of the FLOPs, {part.seconds / full.seconds:.0%} of the time (paper: 86.1 %)"
    return [
        f"  Table 1, a step of 4 rows with layers 6-16 against full tuning, by plan: {shares}",
        f"  memory of that step: {part.memory.total / 2**30:.0f} GiB against {full.memory.total / 2**30:.0f} GiB",
        f"  lightning-mm plan --model.backbone.path {model} --model.tuning IntermediateOnly --model.tuning.layers 6-16 "
        f"--image_tokens 576 --text_tokens 64 --supervised 16 --device {device} --trainer.precision bf16-mixed",
    ]


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


_MODEL = "llava-hf/llava-1.5-7b-hf"
COMMANDS = {
    "p1": [
        f"lightning-mm inspect {_MODEL} --probes coco/annotations/captions_val2014.json --image_root coco/val2014 \\",
        f"    --images {PICTURES} --measures '[block_influence]' --probing.selectivity true --select false --bf16 true",
    ],
    "p2": [
        f"lightning-mm trace {_MODEL} --questions data_constraints/okvqa.csv --image_root pictures --convention p2 \\",
        "    --ask 10000 --limit 10000 --parts '[trace,flow,predictor]' \\",
        "    --flow '[image_late->constraint,image_early->constraint,constraint->last,image->last]' --bf16 true",
        f"lightning-mm trace {_MODEL} --questions data_constraints/okvqa.csv --image_root pictures --convention p2 \\",
        "    --tracing.width 5 --ask 10000 --limit 10000 --parts '[trace]' --bf16 true",
        f"lightning-mm edit {_MODEL} --edits edits.json --convention p2 --limit 500",
        f"lightning-mm edit {_MODEL} --edits edits.json --convention p2 --clamp 4 --limit 500",
    ],
    "p3": [
        "# BASE: Vicuna-7B-v1.5 with llava-v1.5-mlp2x-336px-pretrain as one folder; TUNED: llava-hf/llava-1.5-7b-hf.",
        "# Both with a chat_template.jinja that keeps the order of picture and text: the released one writes pictures",
        "# first, and rows with the picture last are then refused.",
        "lightning-mm inspect BASE --against TUNED --probes coco/annotations/captions_val2014.json \\",
        f"    --image_root coco/val2014 --images {PICTURES} --neighbours 30 --both_last true --svcca_variance 0.95 \\",
        "    --measures '[overlap,overlap_matrix,cka_biased,svcca,distance_correlation,id_correlation,id_gride,",
        "    entropy_unit_rows,token_cosine,gap_auc]' --probing.probes '[]' --text_only false --select false \\",
        "    --bf16 true",
        "lightning-mm trace BASE --against TUNED --questions QUESTIONS --data COCOVQA.json --parts '[]' --limit 1 \\",
        f"    --transplant.width 1 --transplant.step 2 --batch_size 8 --batches {PICTURES // 8} --bf16 true",
    ],
}


if __name__ == "__main__":
    main()
