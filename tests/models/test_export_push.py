"""Uploads to a hub: huggingface_hub speaks to a small server on this machine that answers as the hub does."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from lightning_mm.core.errors import UserError
from lightning_mm.models.export.push import HubRepo
from tests.helpers.hub import Hub, hub

__all__ = ["hub"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("---\nlibrary_name: transformers\n---\n# Mine\n")
    (tmp_path / "out/config.json").write_text("{}")
    (tmp_path / "out/model.safetensors").write_bytes(bytes(range(256)))
    return tmp_path / "out"


@pytest.mark.parametrize("private", [True, False])
def test_a_folder_is_uploaded_whole(hub: Hub, folder: Path, private: bool) -> None:
    assert "me/mine" in HubRepo.open("me/mine", private).upload(folder)
    assert hub.repos == {"me/mine": private}
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.tokens == {"Bearer hf_secret"}


def test_a_refusal_leaves_the_folder_and_says_how_to_go_on(hub: Hub, folder: Path) -> None:
    hub.refuses = True
    with pytest.raises(UserError, match="me/mine cannot be uploaded") as caught:
        HubRepo.open("me/mine").upload(folder)
    assert "hf_secret" not in str(caught.value)
    assert f"hf upload me/mine {folder}" in caught.value.fix
    assert (folder / "config.json").is_file()


def test_a_hub_that_is_away_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="cannot be uploaded"):
        HubRepo.open("me/mine").upload(folder)


@pytest.mark.parametrize(
    ("name", "token", "offline", "why"),
    [
        ("mine", "t", False, "no owner"),
        ("me/mine/x", "t", False, "Repo id must be"),
        ("me/mine", None, False, "no token"),
        ("me/mine", "t", True, "HF_HUB_OFFLINE"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(
    name: str, token: str | None, offline: bool, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError) as caught:
        HubRepo.open(name)
    assert why in caught.value.why
