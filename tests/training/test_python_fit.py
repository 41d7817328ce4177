"""A fit from Python: a plain trainer leaves what the command line leaves, and takes what a user has already."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from lightning_mm import Backbone, Full, IntermediateOnly, LoRAOnMiddle, MMDataModule, MMModule, PerRegion, UserError
from lightning_mm.__main__ import main
from lightning_mm.core.decisions import decision_log
from lightning_mm.training.callbacks.evaluation import HeldOutEvaluation
from lightning_mm.training.callbacks.run_recorder import RunRecorder
from tests.helpers.data import Data, Family

pytestmark = pytest.mark.filterwarnings(
    "ignore:Starting from v1.9.0, `tensorboardX`",
    "ignore:`is_gradient_checkpointing`",  # PEFT asks an older name
    "ignore:You are trying to `self.log",
    "ignore:You defined a `validation_step` but",
)
LAYERS = "1-2"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_MM_RUN", raising=False)
    return tmp_path


def plain(*callbacks: Any, **options: Any) -> L.Trainer:
    """A trainer as anyone makes it, for two steps, with nothing evaluated around them."""
    quiet = [] if any(isinstance(each, HeldOutEvaluation) for each in callbacks) else [HeldOutEvaluation(False, False)]
    return L.Trainer(**{"max_steps": 2, "accelerator": "cpu", "callbacks": [*callbacks, *quiet], **options})


def rows_of(data: Data, **options: Any) -> MMDataModule:
    return MMDataModule(train=str(data["train"]), batch_size=2, num_workers=0, **options)


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options)


def names(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.suffix != ".png"}


def test_a_plain_trainer_leaves_what_the_command_line_leaves(family: Family, data: Data, here: Path) -> None:
    """The same weights to the bit, the same files, and every verb reads them."""
    model = str(family("llava"))
    paths = [part for split, path in data.items() for part in (f"--data.{split}", str(path))]
    options = ["--model.backbone.path", model, "--model.tuning", "IntermediateOnly", "--model.tuning.layers", LAYERS]
    options += [*paths, "--data.batch_size", "2", "--data.num_workers", "0", "--run.wandb", "off", "--run.name", "cli"]
    assert main(["fit", *options, "--trainer.accelerator", "cpu", "--trainer.max_steps", "4"]) == 0

    L.seed_everything(0, verbose=False)
    module = MMModule(model, IntermediateOnly(LAYERS))
    files = MMDataModule(**{split: str(path) for split, path in data.items()}, batch_size=2, num_workers=0)
    trainer = plain(HeldOutEvaluation(), RunRecorder(name="python"), max_steps=4, log_every_n_steps=10)
    trainer.fit(module, datamodule=files)

    of = {run: here / "runs" / run for run in ("cli", "python")}
    one, two = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in of.values())
    assert one["state_dict"].keys() == two["state_dict"].keys() != set()
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name
    assert names(of["cli"]) == names(of["python"])
    assert not (here / "lightning_logs").exists()
    one, two = (yaml.safe_load((run / "config.yaml").read_text())["model"] for run in of.values())
    assert two["backbone"] == one["backbone"] | {"revision": None}
    assert {key: one[key] for key in ("compute", "optimizer")} == {key: two[key] for key in ("compute", "optimizer")}
    assert main(["report", str(of["python"])]) == 0
    assert main(["export", str(of["python"]), "--prove", "false"]) == 0
    exported = loaded(of["python"] / "export").state_dict()
    for name, parameter in module.model.state_dict().items():
        assert torch.equal(exported[name], parameter), name


def test_two_fits_never_write_into_one_folder(family: Family, data: Data, here: Path) -> None:
    """Not with the same module and callbacks in another trainer, nor twice with one trainer."""
    module, evaluation, files = MMModule(family("llava"), Full()), HeldOutEvaluation(False, False), rows_of(data)
    for _ in range(2):
        plain(evaluation).fit(module, datamodule=files)
    trainer = plain(evaluation)
    trainer.fit(module, datamodule=files)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, datamodule=files)
    runs = sorted(path.name for path in (here / "runs").iterdir())
    assert runs == ["Full", "Full-2", "Full-3", "Full-4"]
    for run in runs:
        assert (here / "runs" / run / "checkpoints/last.ckpt").is_file(), run
        assert (here / "runs" / run / "report.html").is_file(), run


@pytest.mark.parametrize(
    ("options", "there", "absent"),
    [
        ({"enable_checkpointing": False}, "runs/Full/metrics.csv", "runs/Full/checkpoints"),
        ({"logger": False, "enable_progress_bar": False}, "runs/Full/checkpoints/last.ckpt", "runs/Full/metrics.csv"),
        ({"default_root_dir": "elsewhere"}, "elsewhere/runs/Full/checkpoints/last.ckpt", "runs"),
        ({"barebones": True}, "data", "runs"),
    ],
    ids=lambda options: "-".join(options) if isinstance(options, dict) else "",
)
def test_trainer_options_count(
    options: dict[str, Any], there: str, absent: str, family: Family, data: Data, here: Path
) -> None:
    if "barebones" in options:
        trainer = L.Trainer(max_steps=1, accelerator="cpu", **options)
    else:
        trainer = plain(**{"log_every_n_steps": 1, **options})
    trainer.fit(MMModule(family("llava"), Full()), datamodule=rows_of(data))
    assert (here / there).exists()
    assert not (here / absent).exists()


def test_a_loaded_model_is_tuned_in_place_and_left_clean(family: Family, data: Data, here: Path) -> None:
    model = loaded(family("llava"))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    attention = model.config._attn_implementation
    module = MMModule(model, IntermediateOnly(LAYERS), lr=1e-2)
    plain().fit(module, datamodule=rows_of(data))
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".layers.1." in name or ".layers.2." in name} - {
        name for name in before if "vision" in name
    }
    assert [name for name, part in model.named_modules() if "forward" in vars(part)] == []
    assert model.config._attn_implementation == attention
    assert yaml.safe_load((here / "runs/IntermediateOnly/config.yaml").read_text())["model"]["backbone"]["path"]


def test_bf16_leaves_the_frozen_weights_of_a_loaded_model(family: Family, data: Data, here: Path) -> None:
    model = loaded(family("llava"))
    plain(max_steps=1, precision="bf16-mixed").fit(MMModule(model, Full()), datamodule=rows_of(data))
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def adapted(folder: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(loaded(folder), LoraConfig(target_modules=["q_proj"]))


def checkpointed(folder: Path) -> Any:
    model = loaded(folder)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (adapted, "adapters already"),
        (checkpointed, "Gradient checkpointing is on"),
        (lambda folder: AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float16), "float16"),
        (lambda folder: loaded(folder).model, "cannot answer"),
        (lambda folder: torch.nn.Linear(1, 1), "no model of transformers"),
    ],
)
def test_a_model_that_cannot_be_tuned_is_refused_at_once(
    make: Callable[[Path], Any], says: str, family: Family
) -> None:
    with pytest.raises(UserError, match=says):
        MMModule(make(family("llava")), Full())


def loader(folder: Path, data: Data, **labels: Any) -> DataLoader[Any]:
    """A user's own loader: what the processor returns, every token learned but padding."""
    import json

    processor, at = AutoProcessor.from_pretrained(folder), data["train"].parent

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        talks = [
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": row["conversations"][1]["value"]}]},
            ]
            for row in rows
        ]
        texts = [processor.apply_chat_template(talk, tokenize=False) for talk in talks]
        pictures = [[Image.open(at / row["image"])] for row in rows]
        side = {"padding": True, "padding_side": labels.get("side", "right")}
        batch = processor(text=texts, images=pictures, return_tensors="pt", **side)
        batch["labels"] = batch["input_ids"].clone()
        if labels.get("mask", True):
            batch["labels"][batch["attention_mask"] == 0] = -100
        return batch  # type: ignore[no-any-return]

    rows = json.loads(data["train"].read_text())
    return DataLoader(rows, batch_size=3, collate_fn=collate)


def test_an_own_loader_is_trained_on_with_transformers_loss(family: Family, data: Data, here: Path) -> None:
    """The first step's loss is the one that transformers computes of the same batch."""
    folder = family("llava")
    mine = loader(folder, data)
    batch = next(iter(mine))
    with torch.no_grad():
        expected = loaded(folder)(**batch).loss
    module = MMModule(folder, IntermediateOnly(LAYERS), optimizer=lambda params: torch.optim.SGD(params, 1e-2))
    trainer = plain(max_steps=1)
    trainer.fit(module, mine, loader(folder, data))
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], expected)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1e-2]
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    (scores,) = plain().validate(module, loader(folder, data), verbose=False)
    assert scores["val/loss"] > 0
    assert "model.cache: off" in " ".join(map(str, decision_log())) or (here / "runs").is_dir()


@pytest.mark.parametrize(
    ("labels", "says"), [({"side": "left"}, "padded on the left"), ({"mask": False}, "on padding")]
)
def test_a_batch_that_would_be_learned_wrongly_is_refused(
    labels: dict[str, Any], says: str, family: Family, data: Data, here: Path
) -> None:
    with pytest.raises(UserError, match=says):
        plain(max_steps=1).fit(MMModule(family("llava"), Full()), loader(family("llava"), data, **labels))


class Scheduled(MMModule):
    """A user's subclass with an optimizer of its own."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def test_a_subclass_with_its_own_optimizer_and_schedule(family: Family, data: Data, here: Path) -> None:
    trainer = plain(max_epochs=2, max_steps=-1)
    trainer.fit(Scheduled(family("llava"), Full()), datamodule=rows_of(data))
    assert trainer.global_step == 12
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 / 4)
    assert "model.cache" in (here / "runs/Full/decisions.json").read_text()
    census = yaml.safe_load((here / "runs/Full/census.json").read_text())
    assert {row["lr"] for row in census["rows"]} == {None}


@pytest.mark.parametrize("tuning", [IntermediateOnly(LAYERS), LoRAOnMiddle(LAYERS)], ids=["full", "lora"])
def test_a_checkpoint_becomes_the_module_again(tuning: Any, family: Family, data: Data, here: Path) -> None:
    module = MMModule(family("llava"), tuning, lr=1e-2)
    picture = data["train"].parent / "picture-0-0.png"
    before = module.generate(picture, "What colour is it?")  # of the untuned model, which the fit then tunes
    assert before == MMModule(loaded(family("llava")), tuning).generate(Image.open(picture), "What colour is it?")
    plain().fit(module, datamodule=rows_of(data))
    again = MMModule.load_from_checkpoint(here / f"runs/{type(tuning).__name__}/checkpoints/last.ckpt")
    for name, tensor in module.trainable.items():
        assert torch.equal(again.trainable[name], tensor), name
    assert [name for name, part in again.model.named_modules() if "forward" in vars(part)] == []
    assert again.generate(picture, "What colour is it?") == module.generate(picture, "What colour is it?")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: MMModule("m", learning_rate=1e-4), "lr=1e-5"),
        (lambda: MMModule("m", Full(), batch_size=2), "MMDataModule"),
        (lambda: MMModule("m", quantization="nf4"), "Backbone"),
        (lambda: MMModule("m", "Full"), "no tuning policy"),
        (lambda: MMModule("m", Full), "no tuning policy"),
        (lambda: MMModule(3), "cannot tune"),
        (lambda: MMModule("m", Full(), optimizer="sgd"), "lambda params"),
        (lambda: MMModule("m", Full(), optimizer=torch.optim.SGD, lr=1.0), "has no effect"),
        (lambda: Backbone("m", dtype="bf16"), "Did you mean bfloat16"),
        (lambda: Full(vision="all"), "no choice"),
        (lambda: MMDataModule(train="x.json").processing, "processor"),
    ],
)
def test_a_wrong_guess_is_one_clear_error(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        call()


def test_layers_of_frozen_blocks_are_refused(family: Family) -> None:
    module = MMModule(family("llava"), PerRegion(LAYERS, connector="full"))
    with pytest.raises(UserError, match="has no effect"):
        module.configure_model()
