"""The adapters of examples/benchmarks for lmms-eval and VLMEvalKit: an exported folder answers as the live model does.

The suites are not installed beside this package. Here their base classes are stood in for, with the members that
lmms-eval 0.7.3 and VLMEvalKit (commit e8e78f0) call and require. With BENCH_PYTHON, an interpreter that has lmms-eval,
and VLMEVALKIT, a clone of VLMEvalKit whose requirements it has too, the suites themselves run on a local task.
"""

import abc
import base64
import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from lightning_mm.models.generation import greedy_answers
from tests.helpers.data import Family
from tests.helpers.export_model import subject

ADAPTERS = Path(__file__).parents[1] / "examples/benchmarks"
QUESTIONS = ("Which colour is it?", "Is this an animal?")
TOKENS = 6


@pytest.fixture(scope="module")
def folder(family: Family) -> Path:
    return family("llava")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of conversations, with one picture each."""
    root = tmp_path_factory.mktemp("rows")
    written = []
    for index, question in enumerate(QUESTIONS):
        Image.new("RGB", (40, 28), (60 * index, 30, 90)).save(root / f"{index}.png")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "No."}]
        written.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (root / "val.json").write_text(json.dumps(written))
    return root / "val.json"


@pytest.fixture(scope="module")
def expected(folder: Path, rows: Path) -> list[str]:
    """Answers of the live model, as training's own evaluation asks for them."""
    s, answers = subject(folder), []
    for index, question in enumerate(QUESTIONS):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = s.processing.render([{"role": "user", "content": content}], add_generation_prompt=True)
        picture = Image.open(rows.parent / f"{index}.png").convert("RGB")
        inputs = s.processing.encode([text], [[picture]], "left").inputs
        answers += greedy_answers(s.model, s.processing.processor, inputs, TOKENS)
    assert len(set(answers)) > 1
    return answers


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The folder of adapters is importable, and what they import is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(ADAPTERS))
    yield monkeypatch
    for name in ("exported", "lmms_eval_export", "vlmevalkit_export", "questions"):
        sys.modules.pop(name, None)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


class Lmms(abc.ABC):
    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]: ...
    @abc.abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...
    @abc.abstractmethod
    def generate_until_multi_round(self, requests: list[Any]) -> list[str]: ...


class ChatMessages:
    def __init__(self, messages: Sequence[dict[str, Any]]) -> None:
        self.messages = messages

    def to_hf_messages(self) -> list[dict[str, Any]]:
        def part(content: dict[str, Any]) -> dict[str, Any]:
            kind = content["type"]
            return {"type": kind, kind: content["text" if kind == "text" else "url"]}

        return [{"role": each["role"], "content": [part(c) for c in each["content"]]} for each in self.messages]


def test_lmms_eval_gets_the_answers_of_the_live_model(
    adapters: pytest.MonkeyPatch, folder: Path, rows: Path, expected: list[str]
) -> None:
    registered: list[SimpleNamespace] = []
    stand_in(adapters, "lmms_eval")
    stand_in(adapters, "lmms_eval.api")
    stand_in(adapters, "lmms_eval.api.model", lmms=Lmms)
    stand_in(adapters, "lmms_eval.cli")
    stand_in(adapters, "lmms_eval.cli.dispatch", main=None)
    registry = SimpleNamespace(register_manifest=registered.append)
    stand_in(adapters, "lmms_eval.models", MODEL_REGISTRY_V2=registry)
    manifest = lambda name, chat_class_path: SimpleNamespace(name=name, path=chat_class_path)  # noqa: E731
    stand_in(adapters, "lmms_eval.models.registry_v2", ModelManifest=manifest)
    stand_in(adapters, "lmms_eval.protocol", ChatMessages=ChatMessages)
    module: Any = importlib.import_module("lmms_eval_export")
    questions: Any = importlib.import_module("questions")
    adapters.setenv("IMAGE_ROOT", str(rows.parent))

    (found,) = registered
    assert (found.name, found.path) == ("exported", "lmms_eval_export.Exported")
    model = module.Exported(pretrained=str(folder), device="cpu", batch_size=1)
    assert not model.is_simple
    documents = json.loads(rows.read_text())
    model.task_dict = {"mine": {"test": documents}}

    def to_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
        pictures = [{"type": "image", "url": picture} for picture in questions.pictures(row)]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": questions.question(row)}]}]

    settings = {"max_new_tokens": TOKENS, "until": ["\n\n"], "temperature": 0, "do_sample": False, "unknown": 1}
    requests = [SimpleNamespace(args=("", to_messages, settings, i, "mine", "test")) for i in (1, 0)]
    assert model.generate_until(requests) == expected[::-1]
    assert questions.score(documents[0], ["  no "]) == {"exact_match": 1.0}
    assert questions.score(documents[0], ["yes"]) == {"exact_match": 0.0}
    with pytest.raises(ValueError, match="--batch_size 1"):
        module.Exported(pretrained=str(folder), batch_size=8)


def test_an_answer_ends_before_the_texts_that_end_it(adapters: pytest.MonkeyPatch, folder: Path) -> None:
    module: Any = importlib.import_module("exported")
    model = module.ExportedModel(str(folder), "cpu")
    chat = [{"role": "user", "content": [{"type": "text", "text": "Is this an animal?"}]}]
    whole = model.answer(chat, {"max_new_tokens": TOKENS})
    end = whole[len(whole) // 2]
    assert model.answer(chat, {"max_new_tokens": TOKENS, "until": [end, ""]}) == whole.split(end)[0].strip() != whole


def test_vlmevalkit_gets_the_answers_of_the_live_model(
    adapters: pytest.MonkeyPatch, folder: Path, rows: Path, expected: list[str]
) -> None:
    class BaseModel:
        INTERLEAVE = False
        allowed_types: Sequence[str] = ("text", "image", "video")

        def generate(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
            assert all(part["type"] in self.allowed_types for part in message)
            answer: str = self.generate_inner(message, dataset)  # type: ignore[attr-defined]
            return answer

    stand_in(adapters, "vlmeval")
    stand_in(adapters, "vlmeval.vlm")
    stand_in(adapters, "vlmeval.vlm.base", BaseModel=BaseModel)
    sys.modules["vlmeval"].vlm = sys.modules["vlmeval.vlm"]  # type: ignore[attr-defined]
    module: Any = importlib.import_module("vlmevalkit_export")
    model = module.Exported(folder=str(folder), device="cpu", max_new_tokens=TOKENS)
    for index, question in enumerate(QUESTIONS):
        picture = {"type": "image", "value": str(rows.parent / f"{index}.png")}
        message = [picture, {"type": "text", "value": question}]
        assert model.generate(message, dataset="MMStar") == expected[index]


def run_suite(arguments: Sequence[str], folder: Path, rows: Path) -> None:
    environment = {**os.environ, "IMAGE_ROOT": str(rows.parent), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment |= {"LMUData": str(rows.parent)}
    environment.pop("PYTHONPATH", None)
    command = [os.environ["BENCH_PYTHON"], *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.skipif("BENCH_PYTHON" not in os.environ, reason="needs an interpreter with lmms-eval: BENCH_PYTHON")
def test_lmms_eval_itself_runs_a_local_task(folder: Path, rows: Path, expected: list[str], tmp_path: Path) -> None:
    model = ["--model", "exported", "--model_args", f"pretrained={folder}", "--device", "cpu", "--batch_size", "1"]
    task = ["--tasks", "my_questions", "--include_path", str(ADAPTERS), "--gen_kwargs", f"max_new_tokens={TOKENS}"]
    out = ["--output_path", str(tmp_path), "--log_samples"]
    run_suite([str(ADAPTERS / "lmms_eval_export.py"), *model, *task, *out], rows.parent, rows)
    (samples,) = tmp_path.glob("*/*_samples_my_questions.jsonl")
    lines = samples.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["filtered_resps"] for line in lines if line] == expected


@pytest.mark.skipif("VLMEVALKIT" not in os.environ, reason="needs a clone of VLMEvalKit: VLMEVALKIT, and BENCH_PYTHON")
def test_vlmevalkit_itself_runs_a_local_task(folder: Path, rows: Path, tmp_path: Path) -> None:
    with (rows.parent / "mine.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "A", "B", "answer"])
        for index, question in enumerate(QUESTIONS):
            picture = base64.b64encode((rows.parent / f"{index}.png").read_bytes()).decode()
            table.writerow([index, picture, question, "yes", "no", "B"])
    model = {"class": "Exported", "folder": str(folder), "device": "cpu", "max_new_tokens": TOKENS}
    config = {"model": {"tiny": model}, "data": {"mine": {"class": "CustomMCQDataset", "dataset": "mine"}}}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    script, clone = ADAPTERS / "vlmevalkit_export.py", Path(os.environ["VLMEVALKIT"])
    run_suite([str(script), "--config", str(tmp_path / "mine.json"), "--work-dir", str(tmp_path / "out")], clone, rows)
    assert list(tmp_path.glob("out/tiny/*/tiny_mine_acc.csv"))
