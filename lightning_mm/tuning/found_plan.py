"""The tuning plan that a model trains by, found on the model: for models whose ``requires_grad`` others have set.

Data flow: ``requires_grad`` of every parameter + layout -> ``TuningPlan``.
"""

from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import Region, plain_name
from lightning_mm.models.lora import weight_name
from lightning_mm.tuning.layers import describe_layers
from lightning_mm.tuning.policy import Mode, TuningPlan


def plan_as_found(mm: MultimodalModel) -> TuningPlan:
    """What trains now, as a plan; the options of adapters are not known."""
    trained = [name for name, parameter in mm.model.named_parameters() if parameter.requires_grad]
    full = {plain_name(name) for name in trained if ".lora_" not in name}
    wrappers = {name.partition(".lora_")[0] for name in trained if ".lora_" in name}
    adapted = {weight_name(name, mm.model.get_submodule(name)) for name in wrappers}
    stacks = adapted & mm.layout.stacks
    places = {name: mm.layout.location_of(name) for name in trained}
    layers = tuple(sorted({place.layer for place in places.values() if place.layer is not None}))

    def mode(region: Region) -> Mode:
        inside = [name for name, place in places.items() if place.region is region]
        return ("lora" if all(".lora_" in name for name in inside) else "full") if inside else "frozen"

    return TuningPlan(
        policy="as found (requires_grad)",
        expression=describe_layers(layers) if layers else "none",
        layers=layers,
        num_layers=mm.layout.num_layers,
        full=frozenset(full),
        adapted=frozenset(name.rpartition(".")[0] for name in adapted - stacks),
        adapted_stacks=frozenset(stacks),
        modes={region: mode(region) for region in Region},
        lora=None,
    )
