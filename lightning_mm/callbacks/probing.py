"""ProbingCallback: what can be read from each layer while the model trains (2402.17304).

Data flow: a look -> ``analysis.probing`` -> accuracies by layer with interval and baselines.
"""

from lightning_mm.analysis.findings import Findings
from lightning_mm.analysis.probing import ProbingOptions, run_probes
from lightning_mm.callbacks.base import InspectingCallback
from lightning_mm.callbacks.runner import Look
from lightning_mm.callbacks.schedule import Schedule


class ProbingCallback(InspectingCallback):
    """Linear probes of every layer: does the caption belong to the picture (global), which objects are there (local)?

    Args:
        schedule: When to look, and how much time that may take.
        options: Which probes, and what is measured beside their accuracy.
        text_only: Probe the captions without their pictures too, at the first look due and the last: what language
            alone gives.
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        options: ProbingOptions = ProbingOptions(),  # noqa: B008  (frozen)
        text_only: bool = True,
    ) -> None:
        super().__init__(schedule)
        self.options, self.text_only = options, text_only

    def wants_text_only(self, outermost: bool) -> bool:
        return self.text_only and outermost

    def analyse(self, look: Look) -> Findings:
        return run_probes(look.reading, look.text_only, look.probe_set, self.options, look.device)
