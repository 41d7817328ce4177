"""Uploads to a hub: huggingface_hub speaks to a small server on this machine that answers as the hub does."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lightning_mm.core.errors import UserError
from lightning_mm.models.export.push import HubRepo


class Hub:
    """What the server was told: repositories with their visibility, files with their content, tokens."""

    def __init__(self) -> None:
        self.repos: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.refuses = False
        self.address = ""

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.refuses:
            return 403, {"error": "You have no right to write to this namespace"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repos.setdefault(name, asked.get("private", asked.get("visibility") == "private"))
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if "/commit/" in path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return 200, {"commitUrl": f"{self.address}/me/mine/commit/1", "commitOid": "1", "pullRequestUrl": None}
        return 200, {"id": "me/mine", "siblings": [], "sha": "0"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.tokens.add(self.headers.get("authorization", ""))
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, answer = state.answer(self.path.partition("?")[0], body)
            self._send(status, answer)

        def do_GET(self) -> None:
            status, answer = state.answer(self.path, b"")
            self._send(status, answer)

        def _send(self, status: int, answer: Any) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", state.address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


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
