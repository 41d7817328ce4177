"""A backbone and a policy made into a model that obeys the policy.

Data flow: ``Backbone`` + ``TuningPolicy`` -> skeleton or model -> anatomy -> plan -> the loaded, frozen, adapted model.
"""

from torch import nn

from lightning_mm.decisions import decide
from lightning_mm.models.anatomy import Anatomy
from lightning_mm.models.loading import Backbone, load_model, load_skeleton
from lightning_mm.tuning.apply import apply_plan
from lightning_mm.tuning.boundary import remove_input_gradient_hooks
from lightning_mm.tuning.policy import TuningPlan, TuningPolicy


def prepare(backbone: Backbone, tuning: TuningPolicy) -> tuple[nn.Module, Anatomy, TuningPlan]:
    """Load a model and put it under a policy. Raises UserError where either cannot be had."""
    model, anatomy, plan = _planned(backbone, tuning)
    apply_plan(model, anatomy, plan)
    if removed := remove_input_gradient_hooks(model):
        decide("input-gradient hooks", f"{removed} removed", "they would put the frozen prefix into the graph")
    return model, anatomy, plan


def _planned(backbone: Backbone, tuning: TuningPolicy) -> tuple[nn.Module, Anatomy, TuningPlan]:
    """What trains at full rank must be known before quantisation takes it: then the plan is made on the skeleton."""
    if backbone.quantization == "none":
        model = load_model(backbone)
        anatomy = Anatomy.of(model)
        return model, anatomy, tuning.plan(anatomy)
    anatomy = Anatomy.of(load_skeleton(backbone))
    plan = tuning.plan(anatomy)
    keep = {name.rpartition(".")[0] for name in plan.full} & anatomy.linears | {anatomy.head}
    return load_model(backbone, keep_full=keep), anatomy, plan
