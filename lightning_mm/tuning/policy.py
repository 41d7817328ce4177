"""Tuning policies: a mode for every region of a model, and the plan they become on one model.

Data flow: config -> ``TuningPolicy`` -> ``plan(layout)`` -> ``TuningPlan`` (names of tensors), which ``apply`` enforces
and ``census`` verifies. A region without a mode is frozen.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import ClassVar, Literal

from lightning_mm.core.choices import refuse_other_choices
from lightning_mm.core.errors import UserError
from lightning_mm.models.block_parts import BlockPart
from lightning_mm.models.layout import ModelLayout, ParameterLocation, Region
from lightning_mm.models.lora import LoRA
from lightning_mm.tuning.layers import LayerSpec, resolve_layers

Mode = Literal["frozen", "lora", "full"]
PartName = Literal["attention", "mlp", "norm", "mixer", "experts", "shared_experts", "router", "indexer", "other"]
"""Values of ``BlockPart``."""


@dataclass(frozen=True)
class TuningPlan:
    """A policy resolved on one model.

    Args:
        policy: The policy, as the user would write it.
        expression: The layer range as written.
        layers: Indices of the decoder blocks that train.
        num_layers: Decoder blocks of the model.
        full: Parameter names trained at full rank.
        adapted: Module names that get a LoRA adapter.
        adapted_stacks: Names of 3-D parameters, which hold one matrix per expert, that get one.
        modes: Mode of each region.
        lora: Options of the adapters; None where there are none.
        lr: Learning rate of a region, where it differs from the optimizer's.
        weight_decay: Weight decay of a region, where it differs from the optimizer's.
    """

    policy: str
    expression: str
    layers: tuple[int, ...]
    num_layers: int
    full: frozenset[str]
    adapted: frozenset[str]
    modes: Mapping[Region, Mode]
    lora: LoRA | None
    lr: Mapping[str, float] = field(default_factory=dict)
    weight_decay: Mapping[str, float] = field(default_factory=dict)
    adapted_stacks: frozenset[str] = frozenset()

    @property
    def adapted_weights(self) -> frozenset[str]:
        """Names of the weights that get a LoRA adapter, as in the plain model."""
        return frozenset(f"{module}.weight" for module in self.adapted) | self.adapted_stacks

    @cached_property
    def modules_of_stacks(self) -> frozenset[str]:
        """Names of the modules that hold ``adapted_stacks``."""
        return frozenset(name.rpartition(".")[0] for name in self.adapted_stacks)

    @property
    def lowest_layer(self) -> int:
        """First decoder block in the autograd graph; ``num_layers`` if only the norm or the head trains."""
        below = (Region.VISION, Region.CONNECTOR, Region.EMBEDDING)
        if any(self.modes[region] != "frozen" for region in below):
            return 0
        return min(self.layers, default=self.num_layers)


class TuningPolicy(ABC):
    """Which weights train; subclasses resolve it on a model."""

    @abstractmethod
    def plan(self, layout: ModelLayout) -> TuningPlan:
        """Resolve the policy on a model's layout."""

    @abstractmethod
    def describe(self) -> str:
        """The policy as a user would write it."""


@dataclass(frozen=True, kw_only=True)
class RegionPolicy(TuningPolicy):
    """What all policies share. A mode that is not given is the policy's own (``modes``), frozen where it has none.

    Args:
        vision: Mode of the vision tower, if it is to differ.
        connector: Mode of what joins tower and decoder, if it is to differ.
        embedding: Mode of the token embedding, if it is to differ.
        norm: Mode of the decoder's final norm, if it is to differ.
        head: Mode of the output head, if it is to differ; a tied head follows the embedding.
        lr: Learning rate by region, where it differs from the optimizer's.
        weight_decay: Weight decay by region, where it differs from the optimizer's.
        lora: Options of the adapters, for regions in mode 'lora'.
    """

    modes: ClassVar[Mapping[Region, Mode]] = {}

    vision: Mode | None = None
    connector: Mode | None = None
    embedding: Mode | None = None
    norm: Mode | None = None
    head: Mode | None = None
    lr: dict[str, float] = field(default_factory=dict)
    weight_decay: dict[str, float] = field(default_factory=dict)
    lora: LoRA = field(default_factory=LoRA)

    def __post_init__(self) -> None:
        refuse_other_choices(self, "model.tuning")

    def layer_spec(self, num_layers: int) -> LayerSpec:
        """The layer range on a model of ``num_layers`` decoder blocks."""
        return "all"

    def layer_parts(self) -> Sequence[PartName] | None:
        """Parts of the chosen blocks that train; None for all."""
        return None

    def mode_of(self, region: Region) -> Mode:
        """Mode of a region: the user's, else the policy's default."""
        given: Mode | None = getattr(self, region.value, None) if region is not Region.LAYERS else None
        return given or self.modes.get(region, "frozen")

    def plan(self, layout: ModelLayout) -> TuningPlan:
        """Resolve the policy on a model's layout.

        Raises:
            UserError: A selector matches nothing, or the layer range lies outside the model.
        """
        modes = self._modes(layout)
        spec = self.layer_spec(layout.num_layers)
        layers = () if modes[Region.LAYERS] == "frozen" else resolve_layers(spec, layout.num_layers)
        chosen = {name: place for name, place in layout.locations.items() if self._chosen(place, modes, layers)}
        full = frozenset(name for name, place in chosen.items() if modes[place.region] == "full")
        lora = frozenset(name for name, place in chosen.items() if modes[place.region] == "lora")
        adapted = {name.rpartition(".")[0] for name in lora} & layout.linears
        plan = TuningPlan(
            policy=self.describe(),
            expression=str(spec) if layers else "none",
            layers=layers,
            num_layers=layout.num_layers,
            full=full,
            adapted=frozenset(adapted),
            modes=modes,
            lora=self.lora if adapted or lora & layout.stacks else None,
            lr=_by_region("lr", self.lr),
            weight_decay=_by_region("weight_decay", self.weight_decay),
            adapted_stacks=lora & layout.stacks,
        )
        self._refuse_empty(layout, plan)
        self._refuse_unused(layout, plan)
        return plan

    def describe(self) -> str:
        """The policy as a user would write it, without options at their default."""
        defaults = type(self)()
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = [f"{n}={v!r}" for n, v in named.items() if n in ("layers", "budget") or v != getattr(defaults, n)]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _modes(self, layout: ModelLayout) -> dict[Region, Mode]:
        modes = {region: self.mode_of(region) for region in Region}
        if layout.tied_head:
            if self.head is not None and self.head != modes[Region.EMBEDDING]:
                raise UserError(
                    f"model.tuning.head: '{self.head}' cannot be had on its own.",
                    "This model's head is tied to its token embedding: they are one tensor.",
                    f"Leave it out; the head follows model.tuning.embedding, which is '{modes[Region.EMBEDDING]}'.",
                )
            modes[Region.HEAD] = modes[Region.EMBEDDING]
        return modes

    def _chosen(self, place: ParameterLocation, modes: Mapping[Region, Mode], layers: tuple[int, ...]) -> bool:
        if place.region is not Region.LAYERS:
            return modes[place.region] != "frozen"
        parts = self.layer_parts()
        # Routers learn well only with a loss that balances them.
        wanted = place.part is not BlockPart.ROUTER if parts is None else place.part in parts
        return place.layer in layers and wanted

    def _refuse_unused(self, layout: ModelLayout, plan: TuningPlan) -> None:
        """Refuse options of something that does not train."""
        found = {layout.locations[name].part for name in plan.full | plan.adapted_weights}
        for part in self.layer_parts() or ():
            if part not in found:
                raise UserError(
                    f"model.tuning.parts: '{part}' has no effect.",
                    f"No tensor that could train is {part}; the layers hold {_parts_in(layout, plan.layers)}.",
                    "Name parts that are there.",
                )
        for option in ("lr", "weight_decay"):
            for region in _by_region(option, getattr(self, option)):
                if plan.modes[Region(region)] == "frozen":
                    raise _unused(f"model.tuning.{option}.{region}", "That region is frozen.")
        for spec in self.lora.rank_per_layer:
            ranked = {layout.locations[name].layer for name in plan.adapted_weights}
            if not set(resolve_layers(spec, layout.num_layers)) <= ranked:
                raise _unused(
                    f"model.tuning.lora.rank_per_layer: '{spec}'", f"Layers with adapters are {list(plan.layers)}."
                )
        for name, value in (("dropout", self.lora.dropout), ("dora", self.lora.dora)):
            if value and plan.adapted_stacks:
                raise UserError(
                    f"model.tuning.lora.{name}: {value} cannot be had on experts.",
                    f"They are held in {len(plan.adapted_stacks)} 3-D parameters, on which PEFT has plain LoRA only.",
                    "Leave it out, or name parts without experts, such as parts: [attention].",
                )

    def _refuse_empty(self, layout: ModelLayout, plan: TuningPlan) -> None:
        for region, mode in plan.modes.items():
            if mode == "frozen" or (region is Region.HEAD and layout.tied_head):
                continue
            names = plan.full if mode == "full" else plan.adapted_weights
            if not any(layout.locations[name].region is region for name in names):
                raise UserError(
                    f"model.tuning.{region}: '{mode}' matches nothing.",
                    f"The model has {len(layout.parameters_in(region))} tensors there"
                    + (", none of them linear, as an adapter needs." if mode == "lora" else "."),
                    "Leave that region frozen, or widen the selection (parts"
                    + (f": there are {_parts_in(layout, plan.layers)})." if region is Region.LAYERS else ")."),
                )
        if not plan.full and not plan.adapted_weights:
            raise UserError(f"{self.describe()} trains nothing.", "Every region is frozen.", "Name a region to train.")


def _parts_in(layout: ModelLayout, layers: Sequence[int]) -> str:
    return ", ".join(sorted({str(p.part) for p in layout.locations.values() if p.layer in layers and p.part}))


def _unused(option: str, why: str) -> UserError:
    return UserError(f"{option} has no effect.", why, "Leave it out, or train what it speaks of.")


def _by_region(option: str, values: Mapping[str, float]) -> dict[str, float]:
    known = [region.value for region in Region if region is not Region.OTHER]
    for name in values:
        if name not in known:
            raise UserError(
                f"model.tuning.{option}: no region is called '{name}'.",
                f"Regions are {', '.join(known)}.",
                f"Write for example {{connector: {values[name]}}}.",
            )
    return dict(values)
