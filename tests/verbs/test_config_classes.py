"""No file makes an object of a name that is not trusted, by any road; what the command line names is trusted."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from jsonargparse import ActionConfigFile, Namespace
from jsonargparse._common import check_import_path, parsing_settings

from lightning_mm.cli.parser import Parser
from lightning_mm.core.errors import UserError
from lightning_mm.training.module_options import ModuleOptions
from lightning_mm.verbs.config_classes import judged_names
from lightning_mm.verbs.trained_run import read_options
from tests.helpers.hostile_configs import CANARY, SOURCE, HostileConfig, hostile_configs, write_files
from tests.helpers.hostile_inputs import cases

PLAIN = ("--model.backbone.path", "none", "--trainer.logger", "false", "--trainer.accelerator", "cpu")
LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that appears if the module is imported or what it holds is called."""
    (tmp_path / f"{CANARY}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "fired"
    sys.modules.pop(CANARY, None)


def parser(**settings: Any) -> Parser:
    """The options of trainer and module, as ``fit`` has them."""
    made = Parser(**settings)
    made.add_argument("-c", "--config", action=ActionConfigFile)
    made.add_argument("--allow", type=str, default="")
    made.add_lightning_class_args(L.Trainer, "trainer")
    made.add_class_arguments(ModuleOptions, "model")
    return made


def read(*arguments: str, **settings: Any) -> Namespace:
    """Trainer and module made of arguments, as the command line makes them."""
    given = [*PLAIN, *arguments]
    with judged_names(given):
        made = parser(**settings)
        return made.instantiate_classes(made.parse_args(given))


def config(folder: Path, **trainer: Any) -> tuple[str, str]:
    """Arguments that name a file with options of the trainer."""
    (folder / "file.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    return "-c", str(folder / "file.yaml")


def attempt(hostile: HostileConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Read a hostile config by its road; returns what was made of it."""
    named = write_files(hostile, folder)
    if hostile.road == "run folder":
        model = {"backbone": {"path": "none"}, **hostile.options["model"]}
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": {}}))
        return read_options(folder / "config.yaml")
    for name, value in hostile.environment.items():
        monkeypatch.setenv(name, value)
    if hostile.road == "environment":
        return read(default_env=True)
    if hostile.road == "default file":
        return read(default_config_files=[str(named)])
    return read("-c", str(named))


def callables(made: Any) -> Iterator[Any]:
    """Functions that a made trainer's callbacks hold."""
    for each in made if isinstance(made, list) else [made]:
        yield from (part for part in getattr(each, "__dict__", {}).values() if callable(part))


@pytest.mark.parametrize("hostile", list(hostile_configs(*cases(40))), ids=lambda each: each.label.partition(" ")[0])
def test_a_hostile_config_runs_nothing(
    hostile: HostileConfig, canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with suppress(UserError):
        made = attempt(hostile, tmp_path, monkeypatch)
        # Options that take strings hand the name on as one, which Lightning then refuses by name.
        assert all(isinstance(made.trainer[key], str) for key in hostile.options["trainer"]), hostile.label
        assert not list(callables(made.trainer.callbacks)), hostile.label
    assert not canary.exists(), hostile.label
    assert CANARY not in sys.modules, hostile.label


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{CANARY}.fire", f"--allow {CANARY}"),
        ("torch.os.system", "It is posix.system"),
        ("lightning_mm.study.run.subprocess.run", "It is subprocess.run"),
        ("torch.hub.load", "It is none of what files may name"),
        ("torch.distributed.launcher.api.elastic_launch", "It is none of what files may name"),
    ],
)
def test_a_refusal_names_file_option_and_name(name: str, said: str, canary: Path, tmp_path: Path) -> None:
    spec = {"class_path": LAMBDA, "init_args": {"on_fit_start": name}}
    with pytest.raises(UserError) as refused:
        read(*config(tmp_path, callbacks=[spec]))
    assert f"{tmp_path / 'file.yaml'}: trainer.callbacks.on_fit_start: {name} is not loaded." in str(refused.value)
    assert said in str(refused.value)


def test_what_the_command_line_names_is_trusted_and_no_more_of_its_package(canary: Path, tmp_path: Path) -> None:
    made = read("--trainer.callbacks", f"{CANARY}.Called")
    assert type(made.trainer.callbacks).__module__ == CANARY
    named = ("--trainer.callbacks", LAMBDA, "--trainer.callbacks.on_fit_start", f"{CANARY}.fire")
    assert read(*named).trainer.callbacks[0].on_fit_start.__module__ == CANARY
    with pytest.raises(UserError, match=f"{CANARY}.Policy is not loaded"):
        read(*named, *config(tmp_path, callbacks=[f"{CANARY}.Policy"]))


def test_a_class_that_is_named_where_its_package_exports_it(canary: Path, tmp_path: Path) -> None:
    (tmp_path / "hostile_outer.py").write_text(f"from {CANARY} import Called\n")
    made = read("--trainer.callbacks", "hostile_outer.Called")
    assert type(made.trainer.callbacks).__module__ == CANARY
    sys.modules.pop("hostile_outer")


def test_allow_trusts_what_a_package_defines(canary: Path, tmp_path: Path) -> None:
    spec = {"class_path": LAMBDA, "init_args": {"on_fit_start": f"{CANARY}.fire"}}
    for allow in (("--allow", f"other,{CANARY}"), (f"--allow={CANARY}",)):
        made = read(*allow, *config(tmp_path, callbacks=[spec]))
        assert made.trainer.callbacks[0].on_fit_start.__module__ == CANARY
    spec["init_args"] = {"on_fit_start": f"{CANARY}.Path.unlink"}
    with pytest.raises(UserError, match=r"It is pathlib\.Path\.unlink"):
        read("--allow", CANARY, *config(tmp_path, callbacks=[spec]))


def test_what_files_may_name(tmp_path: Path) -> None:
    hook = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks.fp16_compress_hook"
    fsdp = {"mixed_precision": {"param_dtype": "torch.float16"}, "sharding_strategy": "FULL_SHARD"}
    strategies = "lightning.pytorch.strategies"
    ddp = {"class_path": f"{strategies}.DDPStrategy", "init_args": {"ddp_comm_hook": hook}}
    made = read(*config(tmp_path, strategy=ddp))
    assert made.trainer.strategy._ddp_comm_hook.__module__ in hook
    made = read(*config(tmp_path, strategy={"class_path": f"{strategies}.FSDPStrategy", "init_args": fsdp}))
    assert str(made.trainer.strategy.mixed_precision.param_dtype) == "torch.float16"


def test_no_config_is_fetched_and_the_settings_are_given_back(tmp_path: Path) -> None:
    before = dict(parsing_settings)
    with pytest.raises(UserError, match=r"model\.tuning"):
        read("-c", "model: {tuning: 'memory://config.yaml'}")
    assert parsing_settings == before
    with judged_names(), pytest.raises(ImportError):
        check_import_path("os.system")
