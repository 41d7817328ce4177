"""From paths to the batches that a trainer gets, with Lightning's own trainer where it matters."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor

from lightning_mm.core.decisions import DecisionLog
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch, PromptBatch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.sample import Sample, Turn, questions_of
from lightning_mm.data.sample_encoder import SampleEncoder
from lightning_mm.models.pixel_bounds import PixelBounds
from tests.helpers.videos import write_video

# Lightning's advice on numbers of workers is not what is tested; that it calls a deprecated torch class is its own to
# mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
NUM_ROWS = 11


def row(index: int, answer: str = "", **others: Any) -> dict[str, Any]:
    answer = answer or ("Red" if index % 3 else "Blue")
    said = [{"from": "human", "value": f"<image>\nColour {index}?"}, {"from": "gpt", "value": answer, "type": "colour"}]
    more = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": str(index % 2), "type": "number"}]
    return {"id": str(index), "image": f"{index % 3}.png", "conversations": said + more, **others}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(3):
        Image.linear_gradient("L").resize((40 + index, 30)).convert("RGB").save(tmp_path / f"{index}.png")
    write(tmp_path / "train.json", [row(index) for index in range(NUM_ROWS)])
    write(tmp_path / "val.json", [row(index) for index in range(5)])
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def module(folder: Path, family: Callable[[str], Path]) -> Callable[..., MMDataModule]:
    def make(**options: Any) -> MMDataModule:
        paths = {"train": str(folder / "train.json"), "val": str(folder / "val.json")}
        return MMDataModule(
            **{**paths, "processor": str(family("llava")), "batch_size": 2, "num_workers": 0, **options}
        )

    return make


Make = Callable[..., MMDataModule]


class Recorder(L.LightningModule):
    """Writes down which samples it is given where."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[str, ...]] = []
        self.evaluated: list[tuple[int, str, str]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.trained.append(tuple(sample.id for sample in batch.samples))
        return self.weight * batch.num_supervised

    def validation_step(self, batch: Batch | PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        kind = type(batch).__name__
        self.evaluated += [(dataloader_idx, kind, sample.id) for sample in batch.samples]

    test_step = validation_step

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> tuple[str, ...]:
        return tuple(sample.id for sample in batch.samples)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopAt(L.Callback):
    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


def trainer(folder: Path, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=2,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


@pytest.mark.parametrize("stop", [4, 8])
@pytest.mark.parametrize("order", [{}, {"group_by_length": True}, {"max_tokens": 190}], ids=str)
def test_fit_kill_and_resume(order: dict[str, Any], stop: int, module: Make, folder: Path) -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(folder).fit(whole, datamodule=module(**order))
    half = len(whole.trained) // 2
    assert half == 6
    assert sorted(sample for batch in whole.trained[:half] for sample in batch) == sorted(map(str, range(NUM_ROWS)))
    assert whole.trained[:half] != whole.trained[half:]
    with pytest.raises(InterruptedError):
        trainer(folder, StopAt(stop, folder / "k.ckpt")).fit(first, datamodule=module(num_workers=2, **order))
    again = module(num_workers=2, **order)
    trainer(folder).fit(second, datamodule=again, ckpt_path=folder / "k.ckpt", weights_only=True)
    assert first.trained + second.trained == whole.trained
    assert torch.equal(second.weight, whole.weight)


@pytest.mark.parametrize("form", ["parquet", "saved", "folder"])
def test_kill_and_resume_from_other_forms(form: str, module: Make, folder: Path) -> None:
    """Rows that hold their pictures are trained in the order of the JSON file, killed and resumed with workers too."""
    rows = [row(index) for index in range(NUM_ROWS)]
    content = [{**each, "image": {"bytes": (folder / each["image"]).read_bytes(), "path": None}} for each in rows]
    data = datasets.Dataset.from_list(content)
    given = folder / form
    given.mkdir()
    if form == "saved":
        data.save_to_disk(given)
    elif form == "parquet":
        data.to_parquet(given / "rows.parquet")
        given /= "rows.parquet"
    else:
        for part in range(2):
            data.shard(2, part, contiguous=True).to_parquet(given / f"train-{part:05d}-of-00002.parquet")
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(folder).fit(whole, datamodule=module())
    options = {"train": str(given), "num_workers": 2}
    with pytest.raises(InterruptedError):
        trainer(folder, StopAt(4, folder / "k.ckpt")).fit(first, datamodule=module(**options))
    trainer(folder).fit(second, datamodule=module(**options), ckpt_path=folder / "k.ckpt", weights_only=True)
    assert first.trained + second.trained == whole.trained
    assert torch.equal(second.weight, whole.weight)


@pytest.mark.parametrize("order", [{}, {"group_by_length": True}, {"max_tokens": 190}], ids=str)
def test_a_shuffled_file_is_not_gone_on_with(order: dict[str, Any], module: Make, folder: Path) -> None:
    """As many rows of the same lengths in another order: batches would be repeated and left out."""
    with pytest.raises(InterruptedError):
        trainer(folder, StopAt(4, folder / "k.ckpt")).fit(Recorder(), datamodule=module(**order))
    rows = [row(index) for index in range(NUM_ROWS)]
    write(folder / "train.json", [rows[1], rows[0], *rows[2:]])
    with pytest.raises(UserError, match="order of samples cannot be continued") as caught:
        trainer(folder).fit(Recorder(), datamodule=module(**order), ckpt_path=folder / "k.ckpt", weights_only=True)
    assert "the rows of data.train differ" in caught.value.why
    write(folder / "train.json", rows)
    trainer(folder).fit(Recorder(), datamodule=module(**order), ckpt_path=folder / "k.ckpt", weights_only=True)


def test_a_fit_without_validation_leaves_the_trainer_as_it_is(
    module: Make, folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The same trainer validates afterwards, on the data it is then given."""
    caplog.set_level(logging.WARNING)
    model, runs = Recorder(), trainer(folder)
    limit = runs.limit_val_batches
    runs.fit(model, datamodule=module(val=None))
    assert len(model.trained) == 12
    assert not model.evaluated
    assert runs.limit_val_batches == limit
    assert not caplog.records
    assert "WARN" not in capfd.readouterr().err
    runs.validate(model, datamodule=module(), verbose=False)
    assert [sample for loader, _, sample in model.evaluated if loader == 0] == [str(index) for index in range(5)]
    assert sum(loader == 1 for loader, _, _ in model.evaluated) == 10


def test_evaluation_sees_each_sample_and_question_once(module: Make, folder: Path) -> None:
    model = Recorder()
    data = module(
        test=str(folder / "val.json"), predict=str(folder / "val.json"), generation_samples=3, eval_batch_size=4
    )
    trainer(folder).validate(model, data, verbose=False)
    val = [str(index) for index in range(5)]
    questions = [sample for sample in val for _ in range(2)]
    batches = [(0, "Batch", i) for i in val]
    # Questions come with the shortest answers first.
    assert model.evaluated[:5] == batches
    assert sorted(model.evaluated[5:]) == [(1, "PromptBatch", i) for i in questions[:3]]
    model.evaluated.clear()
    trainer(folder).test(model, data, verbose=False)
    assert model.evaluated[:5] == batches
    assert sorted(model.evaluated[5:]) == [(loader, "PromptBatch", i) for loader in (1, 2) for i in questions]
    predicted: Any = trainer(folder).predict(model, data)
    assert [sample for batch in predicted for sample in batch] == questions


def test_rows_of_a_batch_are_foretold(module: Make, folder: Path) -> None:
    data = module(train=str(folder / "train.json"), max_tokens=200)
    batches = [len(batch) for batch in data.train_dataloader()]
    assert data.rows_per_batch == pytest.approx(sum(batches) / len(batches))
    assert module(train=str(folder / "train.json"), batch_size=3).rows_per_batch == 3


def test_a_few_questions_read_a_few_rows() -> None:
    turns = (Turn("user", "What?"), Turn("assistant", "A."), Turn("user", "And?"), Turn("assistant", "B."))
    samples = iter([Sample(str(number), turns) for number in range(10)])
    assert [(sample.id, index) for sample, index in questions_of(samples, 3)] == [("0", 1), ("0", 3), ("1", 1)]
    assert next(samples).id == "2"
    assert len(questions_of(samples)) == 14


def test_questions_with_short_answers_come_first(module: Make, folder: Path) -> None:
    """A batch is generated until its longest answer ends; the order of the file is kept for what is reported."""
    data = module(test=str(folder / "val.json"), eval_batch_size=2)
    lengths = [len(text) for batch in data.question_loader("test") for text in batch.references]
    in_file = [len(sample.turns[turn].text) for sample, turn in data.questions("test")]
    assert lengths == sorted(in_file)
    assert lengths != in_file


def test_only_the_third_test_loader_is_blind(module: Make, folder: Path) -> None:
    data = module(test=str(folder / "val.json"))
    _, seen, blind = (next(iter(loader)) for loader in data.test_dataloader())
    for batch, is_blind in ((seen, False), (blind, True)):
        by_channel = batch.inputs["pixel_values"].flatten(2)
        assert torch.equal(by_channel, by_channel[..., :1].expand_as(by_channel)) == is_blind


def test_fit_without_validation(module: Make, folder: Path) -> None:
    model = Recorder()
    trainer(folder).fit(model, datamodule=module(val=None))
    assert len(model.trained) == 12


def test_predict_needs_no_answers(module: Make, folder: Path) -> None:
    asked = [{"image": "0.png", "conversations": [{"from": "human", "value": "Well?"}]}]
    batch = next(iter(module(predict=write(folder / "ask.json", asked)).predict_dataloader()))
    assert batch.references == ("",)
    assert batch.turns == (1,)


def test_example_and_majority(module: Make, folder: Path) -> None:
    text = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    data = module(train=write(folder / "t.json", [text, *(row(index) for index in range(7))]))
    batch = data.example_batch()
    assert [sample.id for sample in batch.samples] == ["0"]
    assert batch.num_supervised > 0
    assert data.rows.majority_answers() == {"any": "ho", "colour": "red", "number": "0"}


def test_the_majority_costs_a_test_nothing(module: Make, folder: Path) -> None:
    """Training pictures are not opened, training rows are not in the ledger, and without them the test goes on."""
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:20])
    train = write(folder / "t.json", [row(index, image="cut.png") for index in range(7)])
    gone = write(folder / "g.json", [{"id": "0", "conversations": [{"from": "human", "value": "No answer?"}]}])
    test = write(folder / "e.json", [row(0)])
    data = module(train=train, test=test)
    data.setup("test")
    assert data.rows.majority_answers() == {"colour": "red", "number": "0"}
    assert data.rejected_samples.num_rows == {"test": 1}
    assert not list(data.rejected_samples)
    for file in (None, folder / "nowhere.json", gone):
        with DecisionLog().opened() as decisions:
            assert module(train=file, test=test).rows.majority_answers() == {}
            assert [decision.value for decision in decisions if decision.name == "majority"] == ["not computed"]


def test_every_split_is_looked_at_before_one_is_read_whole(module: Make) -> None:
    with (
        DecisionLog().opened() as decisions,
        pytest.raises(UserError, match=r"No data file nowhere\.json"),
    ):
        module(val="nowhere.json").setup("fit")
    assert [decision.name for decision in decisions] == ["data.source.train"], "no row is read, no picture is checked"


def test_a_temperature_that_is_none_is_refused_before_anything_is_read(module: Make) -> None:
    with pytest.raises(UserError, match=r"data\.temperature is 0"):
        module(temperature=0.0)
    assert module(temperature=float("inf"))


def test_where_all_pictures_are_missing_the_image_root_is_named(module: Make, folder: Path) -> None:
    (folder / "pictures").mkdir()
    for index in range(3):
        (folder / f"{index}.png").rename(folder / "pictures" / f"{index}.png")
    with pytest.raises(UserError, match=r"can be used(.|\n)*Give --data\.image_root"):
        module().setup("fit")
    module(image_root=str(folder / "pictures")).setup("fit")


def test_what_falls_out_is_in_the_ledger(module: Make, folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:20])
    rows = [row(0), row(1, image="gone.png"), row(2, image="cut.png"), row(3)]
    data = module(train=write(folder / "t.json", rows), max_bad_fraction=0.5)
    data.setup("fit")
    assert [sample.id for sample in data.samples("train")] == ["0", "3"]
    assert {entry.origin: entry.reason.partition(":")[0] for entry in data.rejected_samples} == {
        "t.json:1[1]": "missing image",
        "t.json:1[2]": "not an image",
    }
    assert (data.rejected_samples.num_dropped, data.rejected_samples.num_rows) == (2, {"train": 4, "val": 5})
    with pytest.raises(UserError, match=r"2 of 4 rows of data\.train cannot be used"):
        module(train=str(folder / "t.json")).setup("fit")


@pytest.mark.parametrize(
    ("options", "stage", "message"),
    [
        ({"train": None}, "fit", "data.train is not set"),
        ({"val": None}, "validate", "data.val is not set"),
        ({}, "test", "data.test is not set"),
        ({"train": "gone.json"}, "fit", "No data file"),
    ],
)
def test_what_is_missing_is_told_at_setup(module: Make, options: dict[str, Any], stage: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        module(**options).setup(stage)


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size", "max_length", "max_tokens"])
def test_impossible_numbers(name: str) -> None:
    with pytest.raises(UserError, match=f"data.{name} is 0"):
        MMDataModule(**{name: 0})  # type: ignore[arg-type]


def test_no_processor(module: Make) -> None:
    with pytest.raises(UserError, match=r"data\.processor is not set"):
        module(processor="").train_dataloader()
    with pytest.raises(UserError, match="there is no folder"):
        module(processor="/nowhere/at/all").train_dataloader()


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(MMDataModule, "data")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    for option in ("train", "image_root", "max_length", "generation_samples", "revision"):
        assert f"--data.{option} " in text
    assert "Longest conversation in tokens" in text


def test_a_copy_to_cuda_is_not_waited_for(module: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning asks ``Batch.to`` for a device and nothing else."""
    data = module(predict=module().paths["val"])
    asked = []
    batches = [next(iter(data.train_dataloader())), next(iter(data.predict_dataloader()))]
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking=False: asked.append(non_blocking) or self)
    for batch in batches:
        for device, waits_not in (("cuda:0", True), ("cpu", False), (torch.device("mps"), False)):
            asked.clear()
            batch.to(device)
            assert asked
            assert set(asked) == {waits_not}


@pytest.mark.parametrize("order", [{}, {"max_tokens": 190}], ids=str)
def test_workers_are_quiet(
    order: dict[str, Any], module: Make, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    data = module(num_workers=2, **order)
    data.example_batch()  # the tokenizer has run before the workers are forked
    capfd.readouterr()  # the tiny model may have been written just now
    list(data.train_dataloader())
    assert capfd.readouterr().err == ""
    assert not caplog.records


def test_bounds_on_pictures(module: Make, folder: Path, family: Callable[[str], Path]) -> None:
    """Fewer tokens, known before a batch is made; more pictures than allowed drop a row by name."""
    qwen = str(family("qwen2_5_vl"))
    whole, data = module(processor=qwen), module(processor=qwen, max_pixels=512, group_by_length=True)
    assert data.example_batch().inputs["input_ids"].shape[1] < whole.example_batch().inputs["input_ids"].shape[1]
    assert data.processing.bounds == PixelBounds(None, 512)
    assert int(data._lengths.tokens.max()) < int(whole._lengths.tokens.max())
    (folder / "two.png").write_bytes((folder / "0.png").read_bytes())
    turns = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "Yes."}]
    rows = [row(0), {"image": ["0.png", "two.png"], "conversations": turns}]
    data = module(train=write(folder / "t.json", rows), max_images=1)
    batch = data.collator().collate_valid(data.samples("train"), rejected := [])
    assert batch is not None
    assert [each.reason for each in rejected] == ["too many images: the row has 2, data.max_images is 1"]


VIDEOS = ("a.mp4", "a.gif")


def test_videos_of_a_file(module: Make, folder: Path) -> None:
    write_video(folder / "a.mp4", 20)
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    data = module(train=write(folder / "t.json", [{"video": "a.mp4", "conversations": turns}] * 2), video_frames=3)
    batch = data.example_batch()
    assert batch.has_images
    one = module(train=write(folder / "o.json", [row(0)])).example_batch()
    assert len(batch.inputs["pixel_values"].flatten(0, -4)) == 3 * len(one.inputs["pixel_values"].flatten(0, -4))
    lengths = module(train=str(folder / "t.json"), video_frames=3, group_by_length=True)._lengths
    assert lengths.tokens.tolist() == [batch.inputs["input_ids"].shape[1]] * 2


def test_videos_without_their_decoder(module: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the first step where the model takes videos; an animation needs no decoder."""
    write_video(folder / "a.mp4", 20)
    Image.new("RGB", (32, 32)).save(folder / "a.gif", save_all=True, append_images=[Image.new("RGB", (32, 32), "red")])
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    files = {name: write(folder / f"{name}.json", [{"video": name, "conversations": turns}]) for name in VIDEOS}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        with pytest.raises(UserError, match="package av"):
            module(train=files["a.mp4"]).train_dataloader()
        module(train=files["a.gif"]).train_dataloader()
        one_picture = module(train=files["a.mp4"])
        patch.setattr(SampleEncoder, "takes_several_images", False)
        one_picture.train_dataloader()
    (folder / "a.mp4").write_bytes(b"damaged")
    with pytest.raises(UserError, match="None of the 1 rows"):
        module(train=files["a.mp4"]).samples("train")


def test_special_tokens_of_answers(module: Make, folder: Path) -> None:
    file = write(folder / "t.json", [row(0, conversations=[])])
    with pytest.raises(UserError, match=r"data\.special_tokens cannot allow '<no>'"):
        module(train=file, special_tokens=["<no>"]).collator()


def test_no_row_that_fits_is_said_with_lengths(module: Make) -> None:
    with pytest.raises(UserError, match="None of") as caught:
        module(max_length=8).example_batch()
    assert "in the median; data.max_length is 8" in caught.value.why
    assert "data.max_pixels" in caught.value.fix


def test_unusable_rows_at_the_start_end_nothing(module: Make, folder: Path) -> None:
    """Rows that only the model's template refuses, before and after the only one with a picture that can be used."""
    bad = {"image": "0.png", "conversations": [{"from": "human", "value": "</s>"}, {"from": "gpt", "value": "Ho"}]}
    data = module(train=write(folder / "t.json", [bad] * 40 + [row(0)] + [bad] * 100))
    assert data.example_batch().num_supervised
    data = module(train=write(folder / "u.json", [bad] * 200))
    with pytest.raises(UserError, match="None of") as caught:
        data.example_batch()
    assert "special token in the text" in caught.value.why
