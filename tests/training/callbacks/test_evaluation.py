"""Looking never changes training: a run that is evaluated is bit-identical to one that is not."""

from pathlib import Path

import torch

from lightning_mm.training.callbacks.evaluation import HeldOutEvaluation
from lightning_mm.training.eval_context import evaluation_mode
from tests.helpers.data import Family
from tests.helpers.training import DROPOUT, Losses, train


class Watched(HeldOutEvaluation):
    """Evaluates at every step too, and draws random numbers while it looks."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        with evaluation_mode(trainer, pl_module):
            assert not any(part.training for part in pl_module.modules())
            torch.rand(5)
        self._evaluate(trainer, pl_module, ["after"])


def test_a_run_that_is_looked_at_is_the_same(family: Family, data: dict[str, Path], tmp_path: Path) -> None:
    plain, watched = Losses(), Losses()
    options = {"tuning": DROPOUT, "max_steps": 5, "limit_val_batches": 1.0, "val_check_interval": 2}
    alone, _ = train(family("llava"), data, tmp_path, callbacks=[plain], **{**options, "limit_val_batches": 0})
    seen, _ = train(family("llava"), data, tmp_path, callbacks=[watched, Watched()], **options)
    assert watched.by_step == plain.by_step
    for name, parameter in alone.trainable.items():
        assert torch.equal(parameter, seen.trainable[name]), name
    modes = [module.training for module in alone.model.modules()]
    assert [module.training for module in seen.model.modules()] == modes
