"""The named policies: what the papers train, and their controls; each is a ``RegionPolicy`` with other defaults.

Data flow: ``--model.tuning NAME``, or an object in Python -> one of these -> ``TuningPlan``. Options that would turn
one policy into another are left out: on the command line a class may be exchanged while its options stay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from lightning_mm.core.errors import UserError
from lightning_mm.models.layout import Region
from lightning_mm.tuning.layers import LayerSpec, count_layers
from lightning_mm.tuning.policy import Mode, PartName, RegionPolicy


@dataclass(frozen=True)
class _LayerRange(RegionPolicy):
    """A policy on a range of decoder blocks.

    Args:
        layers: Decoder blocks that train: '6-16', '25%-50%', 'uniform:25%', 'last:8', [3, 7, 11].
        parts: Parts of those blocks that train (attention, mlp, norm, mixer, experts, shared_experts, router, indexer,
            other); all but the router if not given.
    """

    layers: LayerSpec = "25%-50%"
    _: KW_ONLY
    parts: list[PartName] | None = None

    def layer_spec(self, num_layers: int) -> LayerSpec:
        return self.layers

    def layer_parts(self) -> Sequence[PartName] | None:
        return self.parts


@dataclass(frozen=True)
class PerRegion(_LayerRange):
    """Every region as you say; what you do not name is frozen.

    Args:
        layers_mode: Mode of those blocks.
    """

    layers: LayerSpec = "all"
    _: KW_ONLY
    layers_mode: Mode = "frozen"

    def layer_spec(self, num_layers: int) -> LayerSpec:
        if self.layers != "all" and self.layers_mode == "frozen":
            raise UserError(
                f"model.tuning.layers: {self.layers} has no effect.",
                "The blocks are frozen, as every region that is not named.",
                "Set layers_mode to full or lora, or leave layers out.",
            )
        return super().layer_spec(num_layers)

    def mode_of(self, region: Region) -> Mode:
        return self.layers_mode if region is Region.LAYERS else super().mode_of(region)


@dataclass(frozen=True, kw_only=True)
class Full(RegionPolicy):
    """All of the language model and the connector; the vision tower stays frozen, as in LLaVA's second stage."""

    modes: ClassVar[Mapping[Region, Mode]] = {
        Region.CONNECTOR: "full",
        Region.EMBEDDING: "full",
        Region.LAYERS: "full",
        Region.NORM: "full",
        Region.HEAD: "full",
    }


@dataclass(frozen=True, kw_only=True)
class IntermediateOnly(_LayerRange):
    """Only a middle range of decoder blocks, at full rank (2606.03871)."""

    modes: ClassVar[Mapping[Region, Mode]] = {Region.LAYERS: "full"}


@dataclass(frozen=True, kw_only=True)
class LoRAOnMiddle(_LayerRange):
    """LoRA adapters on a middle range of decoder blocks, and nowhere else."""

    modes: ClassVar[Mapping[Region, Mode]] = {Region.LAYERS: "lora"}


@dataclass(frozen=True, kw_only=True)
class ConnectorOnly(RegionPolicy):
    """Only what joins the vision tower to the decoder, as in LLaVA's first stage."""

    modes: ClassVar[Mapping[Region, Mode]] = {Region.CONNECTOR: "full"}


@dataclass(frozen=True)
class _EqualBudget(RegionPolicy):
    """A control that trains as many decoder blocks as another policy, elsewhere.

    Args:
        budget: How many blocks: a count, a share, or the range whose number of blocks to match ('6-16').
        parts: Parts of those blocks that train (attention, mlp, norm, mixer, experts, shared_experts, router, indexer,
            other); all but the router if not given.
    """

    modes: ClassVar[Mapping[Region, Mode]] = {Region.LAYERS: "full"}

    budget: LayerSpec = "25%-50%"
    _: KW_ONLY
    parts: list[PartName] | None = None

    def layer_parts(self) -> Sequence[PartName] | None:
        return self.parts


@dataclass(frozen=True, kw_only=True)
class EarlyLayers(_EqualBudget):
    """Control of equal budget: the first blocks."""

    def layer_spec(self, num_layers: int) -> LayerSpec:
        return f"first:{count_layers(self.budget, num_layers)}"


@dataclass(frozen=True, kw_only=True)
class LateLayers(_EqualBudget):
    """Control of equal budget: the last blocks."""

    def layer_spec(self, num_layers: int) -> LayerSpec:
        return f"last:{count_layers(self.budget, num_layers)}"


@dataclass(frozen=True, kw_only=True)
class UniformSparse(_EqualBudget):
    """Control of equal budget: blocks evenly spread over the depth (2412.12785)."""

    def layer_spec(self, num_layers: int) -> LayerSpec:
        return f"uniform:{count_layers(self.budget, num_layers)}"


@dataclass(frozen=True, kw_only=True)
class RandomLayers(_EqualBudget):
    """Control of equal budget: blocks drawn with a seed.

    Args:
        seed: Of the draw.
    """

    seed: int = 0

    def layer_spec(self, num_layers: int) -> LayerSpec:
        return f"random:{count_layers(self.budget, num_layers)}:{self.seed}"
