"""What causes the answers, by layer, in the model that the arms begin from and in the main arm.

Ablation and attention knockout of both; the layers of the main arm transplanted into the starting model, which says by
itself which of the trained layers matter.

Data flow: questions with constraints -> ``verbs.trace`` -> causes.csv.gz of the job, in the columns of layers.csv.
"""

from lightning_mm.causal.study import StudyConfig
from lightning_mm.core.decisions import log
from lightning_mm.core.errors import UserError
from lightning_mm.study.folder import Job, StudyFolder, write_layers
from lightning_mm.study.settings import START, StudySettings
from lightning_mm.verbs.trace import trace


def find(folder: StudyFolder, settings: StudySettings, job: Job, model: str, start: str | None) -> list[str]:
    """Write causes.csv.gz of a job; returns what could not be found out. Nothing is done where causes are left out.

    Args:
        folder: The study's folder.
        settings: The study.
        job: The starting model, or the main arm.
        model: Folder of the model, or of its run.
        start: The model that it began from, into which its layers are transplanted; None: it is that model.
    """
    options = settings.causes
    if options.questions is None or job.seed not in options.seeds or job.arm not in (START, settings.roles.main):
        return []
    config = StudyConfig(parts=("knockout", "ablation"), num_ablated=options.limit)
    asked = {"prompt": options.prompt, "ask": options.ask, "limit": options.limit, "bf16": options.bf16}
    try:
        found = trace(model, options.questions, study=config, **asked)  # type: ignore[arg-type]
        rows, problems = found.rows, list(found.study.findings.problems)
        if start is not None and options.conversations is not None:
            few = {**asked, "limit": 1}
            hybrids = trace(
                start,
                options.questions,
                against=model,
                data=options.conversations,
                batches=options.batches,
                study=StudyConfig(parts=()),
                **few,  # type: ignore[arg-type]
            )
            rows = rows + [row for row in hybrids.rows if row.measure.startswith("transplant")]
            problems += hybrids.study.findings.problems
    except UserError as error:
        log.warning("causes of %s are left out: %s %s", job, error.what, error.why)
        return [f"causes: {error.what} {error.why}"]
    write_layers(folder.results(job) / "causes.csv.gz", rows)
    return problems
