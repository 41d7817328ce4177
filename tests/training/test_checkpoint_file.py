"""A checkpoint is whole or as it was before, is refused if a byte of it has changed, and says what does not fit."""

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from lightning_mm.core.errors import UserError
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.training import checkpoint_file
from lightning_mm.training.checkpoint_file import FORMAT, KEY, CheckpointFile, read_checkpoint
from lightning_mm.training.standard_callbacks import add_standard_callbacks
from lightning_mm.tuning import IntermediateOnly
from tests.helpers.data import Data, Family
from tests.helpers.training import train

POLICY = IntermediateOnly(layers="1-2")


def content(step: int, numbers: int = 1000) -> dict[str, Any]:
    return {KEY: {"version": FORMAT}, "global_step": step, "state_dict": {"a": torch.full((numbers,), float(step))}}


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """While active, no file of this process may grow beyond a size, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """Between the records of the archive are bytes that nothing reads; 600 places of about 8,000."""
    path = tmp_path / "a.ckpt"
    CheckpointFile().save_checkpoint(content(3), path)
    whole, refused = path.read_bytes(), 0
    for place in np.random.default_rng(0).choice(len(whole), 600, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            read = read_checkpoint(path)
        except UserError:
            refused += 1
        else:
            assert torch.equal(read["state_dict"]["a"], torch.full((1000,), 3.0)), place
            assert read["global_step"] == 3, place
    assert refused > 300  # half of the file is the tensor


@pytest.mark.parametrize("known_before", [True, False])
def test_a_full_disk_leaves_the_checkpoint_before(
    known_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    CheckpointFile().save_checkpoint(content(1), path)
    if known_before:
        usage = checkpoint_file.shutil.disk_usage
        monkeypatch.setattr(checkpoint_file.shutil, "disk_usage", lambda place: usage(place)._replace(free=1000))
    with files_up_to(20_000), pytest.raises(UserError, match=f"The disk of {tmp_path} is full") as caught:
        CheckpointFile().save_checkpoint(content(2, numbers=100_000), path)
    assert "last.ckpt of an earlier step is whole" in str(caught.value)
    assert read_checkpoint(path)["global_step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


KILLED = """
import sys, torch
from lightning_mm.training.checkpoint_file import CheckpointFile
step = 0
while True:
    step += 1
    state = {"a": torch.full((2_000_000,), float(step))}
    CheckpointFile().save_checkpoint({"lightning_mm": {}, "global_step": step, "state_dict": state}, sys.argv[1])
    print(step, flush=True)
"""


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for delay in (0.0, 0.011, 0.023):
        with subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told = int(process.stdout.readline())
            time.sleep(delay)
            process.kill()
        read = read_checkpoint(path)
        assert read["global_step"] >= told
        assert torch.equal(read["state_dict"]["a"], torch.full((2_000_000,), float(read["global_step"])))


def test_a_later_format_is_refused_with_both_numbers(tmp_path: Path) -> None:
    CheckpointFile().save_checkpoint({**content(1), KEY: {"version": FORMAT + 1}}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=rf"(?s)later version.*format is {FORMAT + 1}.*up to {FORMAT}"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.fixture
def saved(family: Family, data: Data, tmp_path: Path) -> Path:
    _, trainer = train(family("llava"), data, tmp_path, tuning=POLICY, max_steps=2, plugins=[CheckpointFile()])
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    return tmp_path / "two.ckpt"


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    def remove(checkpoint: dict[str, Any]) -> None:
        held: dict[str, Any] = checkpoint
        for name in names[:-1]:
            held = held[name]
        held.pop(next(iter(held)) if names[-1] == "*" else names[-1])

    return remove


def reshaped(checkpoint: dict[str, Any]) -> None:
    name = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][name] = checkpoint["state_dict"][name][:1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("optimizer_states"), "lacks optimizer_states"),
        (without("loops"), "lacks loops"),
        (without(KEY, "rng"), "lacks lightning_mm.rng"),
        (without("state_dict", "*"), "it lacks model"),
        (reshaped, r"has shape \(1, .*\), here \("),
    ],
)
def test_what_is_missing_is_named(
    change: Callable[[dict[str, Any]], None], told: str, saved: Path, family: Family, data: Data, tmp_path: Path
) -> None:
    checkpoint = torch.load(saved, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, saved)
    with pytest.raises(UserError, match=told):
        train(family("llava"), data, tmp_path, tuning=POLICY, ckpt_path=saved, max_steps=4)


def other_weight(folder: Path) -> str:
    """One value of one frozen weight, in the last place."""
    model = load_model(Backbone(path=str(folder)))
    name, weight = next((n, p) for n, p in model.named_parameters() if "layers.0." in n)
    with torch.no_grad():
        weight.view(-1)[7] = torch.nextafter(weight.view(-1)[7], torch.tensor(9.0))
    model.save_pretrained(folder)
    return rf"1 of \d+ frozen tensors: {name}"


def other_epsilon(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.125
    (folder / "config.json").write_text(json.dumps(config))
    return r"config: text_config.rms_norm_eps 1e-0\d, now 0.125"


def other_colors(folder: Path) -> str:
    processor: Any = AutoProcessor.from_pretrained(folder)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(folder)
    return r"processor: image_processor.image_mean .*, now \[0.1, 0.2, 0.3\]"


@pytest.mark.parametrize("change", [other_weight, other_epsilon, other_colors])
def test_another_base_is_refused_and_what_differs_is_named(
    change: Callable[[Path], str], saved: Path, family: Family, data: Data, tmp_path: Path
) -> None:
    folder = copytree(family("llava"), tmp_path / "other")
    told = change(folder)
    with pytest.raises(UserError, match=rf"(?s)another base model.*{told}"):
        train(folder, data, tmp_path, tuning=POLICY, ckpt_path=saved, max_steps=4)


def test_a_moved_base_is_the_same(saved: Path, family: Family, data: Data, tmp_path: Path) -> None:
    moved = copytree(family("llava"), tmp_path / "moved")
    _, trainer = train(moved, data, tmp_path, tuning=POLICY, ckpt_path=saved, max_steps=4)
    assert trainer.global_step == 4


class Own(CheckpointFile):
    pass


@pytest.mark.parametrize(("given", "used"), [([], CheckpointFile), ([Own()], Own)])
def test_every_trainer_writes_so_unless_the_user_gave_it_a_way(given: list[Any], used: type) -> None:
    trainer = L.Trainer(barebones=True, accelerator="cpu", plugins=given)
    add_standard_callbacks(trainer)
    assert type(trainer.strategy.checkpoint_io) is used
