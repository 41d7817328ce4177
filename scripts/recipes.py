"""What the shipped recipes cost, by ``plan``: python scripts/recipes.py [NAME ...] rewrites their headers and the docs.

A row is the largest that a recipe lets through: the picture with the most tokens within its bounds, and a text. The
model is a folder of its released configuration without weights, so that no network is needed.

Data flow: ``configs/models/NAME.yaml`` + a trainer file for the card -> ``lightning-mm plan --json`` -> lines
``# plan:`` of the recipe, and its row in the table of ``docs/recipes.md``.
"""

import contextlib
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from lightning_mm.__main__ import main as lightning_mm
from lightning_mm.models.pixel_bounds import PixelBounds
from lightning_mm.models.processor import load_processor
from lightning_mm.planning.devices import DEVICES
from lightning_mm.testing import SHAPES, build_shape
from lightning_mm.verbs.picture_size import PictureSizes

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "configs" / "models"
PAGE = ROOT / "docs" / "recipes.md"
TEXT, SUPERVISED = 192, 64
CARDS = {"80 GB": "a100", "24 GB": "rtx4090"}
TRAINERS = ("trainer/gpu.yaml", "trainer/gpu-24gb.yaml")
HEADROOM = 2**30
"""Bytes of a card that are left for its context and for what the allocator does not use."""


@dataclass(frozen=True)
class CardCost:
    """A step on one card.

    Args:
        trainer: The trainer file after the recipe; '' where the recipe fits with none.
        memory: Bytes at the peak, of the last trainer file where none fits.
        seconds: Of a micro-batch.
        rows: Of a micro-batch.
    """

    trainer: str
    memory: float
    seconds: float
    rows: int


@dataclass(frozen=True)
class RecipeCost:
    """What a recipe costs.

    Args:
        name: Of the recipe.
        policy: As written in a plan.
        parameters: Of the model, without adapters.
        trained: Weights that the recipe trains.
        image_tokens: Of the largest picture.
        cards: Cost by the memory of the card.
    """

    name: str
    policy: str
    parameters: int
    trained: int
    image_tokens: int
    cards: dict[str, CardCost]

    def header(self) -> list[str]:
        """The generated lines of the recipe."""
        rows = f"rows of {self.image_tokens} image and {TEXT} text tokens, {SUPERVISED} of them answers"
        return [f"# plan: {rows}", *(f"# plan: {card}: {_said(cost)}" for card, cost in self.cards.items())]

    def row(self) -> str:
        """Its row of the table in the docs."""
        cells = [_cell(cost) for cost in self.cards.values()]
        share = f"{self.parameters / 1e9:.2f} B, {self.trained / self.parameters:.2%}"
        return f"| {' | '.join((f'`{self.name}`', share, self.policy, str(self.image_tokens), *cells))} |"


def recipe_cost(name: str, folder: Path) -> RecipeCost:
    """The cost of a recipe on each card.

    Args:
        name: Of the recipe.
        folder: Its model without weights, as ``build_shape`` writes it.
    """
    tokens = largest_picture(name, folder)
    plans = {}
    cards = {}
    for card, device in CARDS.items():
        for trainer in TRAINERS:
            if (device, trainer) not in plans:
                plans[device, trainer] = _plan(name, folder, tokens, device, trainer)
            told = plans[device, trainer]
            own = told["policies"][0]
            fits = own["memory"]["total"] + HEADROOM <= DEVICES[device].memory
            cards[card] = CardCost(
                trainer if fits else "", own["memory"]["total"], own["seconds"], round(told["shape"]["rows"])
            )
            if fits:
                break
    own = plans[CARDS["80 GB"], TRAINERS[0]]["policies"][0]
    added = own["trained"] if own["policy"].startswith("LoRA") else 0
    return RecipeCost(name, own["policy"], own["parameters"] - added, own["trained"], tokens, cards)


def largest_picture(name: str, folder: Path) -> int:
    """Image tokens of the largest picture that a recipe lets through."""
    options = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))["data"]
    processing = load_processor(str(folder))
    processing.bound_pixels(PixelBounds(options.get("min_pixels"), options.get("max_pixels")))
    sizes = PictureSizes(processing)
    return sizes.num_tokens(sizes.largest())


def _plan(name: str, folder: Path, image_tokens: int, device: str, trainer: str) -> dict[str, Any]:
    out = folder / "plan.json"
    files = ("-c", str(RECIPES / f"{name}.yaml"), "-c", str(ROOT / "configs" / trainer))
    lengths = ("--image_tokens", image_tokens, "--text_tokens", TEXT, "--supervised", SUPERVISED)
    options = (*lengths, "--device", device, "--compare", "false", "--json", out)
    with contextlib.redirect_stdout(io.StringIO()):
        status = lightning_mm(["plan", *files, "--model.backbone.path", str(folder), *map(str, options)])
    assert status == 0, f"plan of {name} failed"
    told: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return told


def _said(cost: CardCost) -> str:
    need = f"{cost.memory / 2**30:.1f} GiB"
    if not cost.trainer:
        return f"does not fit ({need} with {TRAINERS[-1]})"
    more = f" with {cost.trainer}" if cost.trainer != TRAINERS[0] else ""
    return f"{need}, {cost.seconds:.2g} s a step of {cost.rows} rows{more}".replace(" 1 rows", " 1 row")


def _cell(cost: CardCost) -> str:
    if not cost.trainer:
        return f"does not fit ({cost.memory / 2**30:.1f} GiB)"
    how = "QLoRA: " if cost.trainer != TRAINERS[0] else ""
    return f"{how}{cost.memory / 2**30:.1f} GiB, {cost.seconds:.2g} s, {cost.rows}"


def with_header(text: str, cost: RecipeCost) -> str:
    """A recipe with its generated lines in place of the old ones, at the end of its first comment."""
    lines = [line for line in text.splitlines() if not line.startswith("# plan: ")]
    first = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join([*lines[:first], *cost.header(), *lines[first:]]) + "\n"


def with_row(page: str, cost: RecipeCost) -> str:
    """The page with the recipe's row in place of the old one."""
    row = re.compile(rf"^\| `{re.escape(cost.name)}` \|.*$", re.M)
    assert row.search(page), f"docs/recipes.md has no row of {cost.name}"
    return row.sub(lambda _: cost.row(), page)


def main(names: list[str]) -> None:
    """Rewrite the recipes of these names, or all, and the table of the docs."""
    with TemporaryDirectory() as scratch:
        for name in names or SHAPES:
            cost = recipe_cost(name, build_shape(name, Path(scratch) / name))
            file = RECIPES / f"{name}.yaml"
            file.write_text(with_header(file.read_text(encoding="utf-8"), cost), encoding="utf-8")
            PAGE.write_text(with_row(PAGE.read_text(encoding="utf-8"), cost), encoding="utf-8")
            print("\n".join([name, *cost.header()]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
